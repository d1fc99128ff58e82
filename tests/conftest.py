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


def _patch_the_language_once() -> None:
    """Spares the interpreter half of its time.

    It puts its own functions in the place of those of ``triton.language`` whenever a function calls another one, and looks through
    the whole language for what is left to be put in place: nothing is, where the caller's has been. Other releases of Triton whose
    interpreter is not made like this one are left as they are.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter

        plain, scope_of = interpreter._patch_lang, interpreter._LangPatchScope
    except (ImportError, AttributeError):
        return
    replaced: set[int] = set()  # in a launch

    def patch(function):
        wanted = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if wanted and wanted <= replaced:
            return scope_of()
        scope = plain(function)
        restore = scope.restore

        def back():
            replaced.clear()
            restore()

        replaced.update(wanted)
        scope.restore = back  # of the launch: no other is asked for it
        return scope

    interpreter._patch_lang = patch


_patch_the_language_once()


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
