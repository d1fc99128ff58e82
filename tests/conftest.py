"""Settings that hold for every test.

Without a GPU the Triton kernels run through Triton's interpreter; that is decided before anything is imported. Configurations
that the user has tuned have no part in the tests: the cache folder is an empty one.
"""

import os
import tempfile

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _no_configurations_of_the_user():
    with tempfile.TemporaryDirectory() as folder:
        before = {name: os.environ.get(name) for name in ("XDG_CACHE_HOME", "COORDROUTE_CONFIG_DIR", "COORDROUTE_TUNED")}
        os.environ["XDG_CACHE_HOME"] = folder
        os.environ.pop("COORDROUTE_CONFIG_DIR", None)
        os.environ.pop("COORDROUTE_TUNED", None)
        yield
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
