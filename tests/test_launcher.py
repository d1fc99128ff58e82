"""The launcher runs what Triton would run. No GPU is needed: kernels are compiled for one, and a driver that only records."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from coordroute.kernels import launcher  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

SCALE = tl.constexpr(2)

LANGUAGE = {part: dict(vars(part)) for part in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base)}
"""What the compiler needs, before a test has run."""


def _scale(x_ptr, y_ptr, factor: tl.float64, n, stride, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n, other=0.0)
    if FLAG:
        x += 1.0
    tl.store(y_ptr + at, x * factor * SCALE, mask=at < n)


HASHES = """
import sys
import torch
from coordroute.kernels import coordinate_descent, rows, soft_topk
from coordroute.kernels.aot import launches
from coordroute.kernels.config import LaunchConfig
from triton.runtime.jit import JITCallable

config = LaunchConfig("resident", 64, 1, 1, 1, 1)
for op in sys.argv[1:]:
    for launch in launches(op, "float32", 4, 64, True, config, config):
        launch.source().hash()
for module in (rows, soft_topk, coordinate_descent):
    for name, function in vars(module).items():
        if isinstance(function, JITCallable):
            print(module.__name__, name, function.cache_key)
"""


def test_what_a_process_launches_first_makes_no_other_keys_of_tritons_cache():
    """Else every process compiles again what another one has compiled, and so does a program that calls the operators in turn."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    said = [
        subprocess.run([sys.executable, "-c", HASHES, *order], env=environment, capture_output=True, text=True, check=True).stdout
        for order in (("soft_topk", "coordinate_descent"), ("coordinate_descent", "soft_topk"))
    ]
    assert said[0] == said[1] and "_forward" in said[0] and "_iterate" in said[0]


class Driver:
    """Loads nothing; records every launch."""

    def __init__(self) -> None:
        self.device, self.launches = 0, []
        driver = self

        class Runner:
            def __init__(self, src: Any, metadata: Any) -> None:
                self.cooperative = metadata.launch_cooperative_grid

            def __call__(
                self, x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, enter: Any, exit: Any, *args: Any
            ) -> None:
                if enter is not None:
                    enter(told)
                driver.launches.append(((x, y, z), stream, function, packed, self.cooperative, args))
                if exit is not None:
                    exit(told)

        self.launcher_cls, self.utils = Runner, self
        self.loaded = 0

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        self.loaded += 1
        return object(), self.loaded, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 100 + device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's language as it is compiled: its interpreter, in which tests before may have run kernels, leaves its own there."""
    for part, before in LANGUAGE.items():
        for name, now in dict(vars(part)).items():
            if name not in before:
                monkeypatch.delattr(part, name)
            elif now is not before[name]:
                monkeypatch.setattr(part, name, before[name])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiler: None, tmp_path: Path) -> Driver:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # what another run has compiled would hide what does not compile here
    fake = Driver()
    monkeypatch.setattr(launcher, "_binaries", {})
    monkeypatch.setattr(driver, "_active", fake)  # set_active has no way back where there is no GPU
    return fake


@pytest.fixture
def kernel() -> JITFunction:
    return JITFunction(_scale, do_not_specialize=["stride"])


@pytest.fixture
def ordinary(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows with each launch that goes Triton's own way."""
    seen: list[None] = []
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **options: (seen.append(None), run(self, *args, **options))[1])
    return seen


class OnGpu(torch.Tensor):
    """A tensor that the launcher takes for one on a GPU."""

    is_cuda = True


X, Y = (torch.zeros(256).as_subclass(OnGpu) for _ in range(2))


def same(ours: Any, theirs: Any) -> bool:
    """Whether a launch was given the same; the launcher may give a tensor's address in its place."""
    return ours is theirs or ours == (theirs.data_ptr() if isinstance(theirs, torch.Tensor) else theirs)


@pytest.fixture(params=("prepared once", "prepared anew"))
def launch(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Launches what is prepared anew each time, or the same object wherever nothing but tensors and fractions differs."""
    made: dict[Any, launcher.Prepared] = {}

    def do(kernel: Any, grid: Any, x: Any, y: Any, factor: float, *numbers: int, **constants: Any) -> None:
        prepared = launcher.Prepared(kernel, grid, numbers, **constants)
        if request.param == "prepared once":
            dtypes = [None if pointer is None else pointer.dtype for pointer in (x, y)]
            prepared = made.setdefault((kernel, grid, *numbers, *dtypes, *constants, *constants.values()), prepared)
        launcher.launch(prepared, (x, y), (factor,))

    return do


Go = Callable[..., None]


@pytest.fixture
def go(launch: Callable[..., None]) -> Go:
    def do(
        kernel: Any, *, x: Any = X, y: Any = Y, factor: float = 1.5, n: int = 64, stride: int = 64, grid: Any = (3,), **options: Any
    ) -> None:
        launch(kernel, grid, x, y, factor, n, stride, **{"FLAG": True, "BLOCK": 64, "num_warps": 4, **options})

    return do


def test_this_triton_is_known() -> None:
    assert launcher._known, "read its jit.py, compiler.py and driver.py, then add the release to launcher.KNOWN"


def test_the_second_launch_runs_the_binary(gpu: Driver, kernel: JITFunction, ordinary: list[None], go: Go) -> None:
    go(kernel)
    assert len(ordinary) == 1
    go(kernel, factor=2.5, x=Y, y=X, grid=(2, 5))
    go(kernel, n=128, stride=7)  # another multiple of 16, and a stride that is not specialised, of another class
    assert len(ordinary) == 2, "which the launcher tells apart, and Triton's own path serves"
    go(kernel, n=192, stride=9)
    assert len(ordinary) == 2
    first, second, third, fourth = gpu.launches
    assert first[2] == second[2] == third[2] == fourth[2] and gpu.loaded == 1
    assert first[0] == (3, 1, 1) and second[0] == (2, 5, 1) and second[1] == 100
    assert second[3:5] == first[3:5] and second[5][0] == Y.data_ptr() and second[5][2:] == (2.5, 64, 64, True, 64)
    assert first[5][2:] == (1.5, 64, 64, True, 64) and fourth[5][3:5] == (192, 9)


CHOICES: dict[str, list[Any]] = {
    "x": [X, X[1:], X.double(), X.bfloat16(), torch.nn.Parameter(X), None],
    "y": [Y, Y[4:], Y[3:], Y.half()],
    "factor": [1.5, 1.0, 0.0],
    "n": [1, 16, 17, 64, 2**31, 0, -16],
    "stride": [1, 16, 17, 2**31],
    "FLAG": [True, False],
    "BLOCK": [64, 128],
    "num_warps": [4, 8],
    "grid": [(1,), (2, 3), (2, 3, 4), (0,)],
    "launch_cooperative_grid": [True, False],
}


def test_the_launcher_runs_what_triton_runs(gpu: Driver, ordinary: list[None], launch: Callable[..., None]) -> None:
    """Random sequences of launches, each once by the launcher and once by Triton, on two devices."""
    ours, theirs = (JITFunction(_scale, do_not_specialize=["stride"]) for _ in range(2))
    draw = random.Random(0)
    base = {name: values[0] for name, values in CHOICES.items()}
    seen: dict[int, int] = {}
    count = 300
    for _ in range(count):
        gpu.device = draw.choice((0, 1))
        varied = draw.sample(sorted(CHOICES), draw.choice((0, 1, 1, 2)))
        options = {**base, **{name: draw.choice(CHOICES[name]) for name in varied}}
        if options["x"] is None:
            continue  # a pointer that is read
        arguments = [options.pop(name) for name in ("x", "y", "factor", "n", "stride")]
        grid = options.pop("grid")
        gpu.launches.clear()
        launch(ours, grid, *arguments, **options)
        theirs[grid](*arguments, **options)
        (our, their) = gpu.launches
        assert our[:2] == their[:2] and our[3:5] == their[3:5]
        assert all(same(a, b) for a, b in zip(our[5], their[5], strict=True))
        # the two kernels have binaries of their own: the same one here must be the same one there
        assert seen.setdefault(our[2], their[2]) == their[2]
    assert len(set(seen.values())) == len(seen) > 20
    assert len(ordinary) < 1.7 * count, "most of them by the short way"


def test_another_option_is_another_binary(gpu: Driver, kernel: JITFunction, go: Go) -> None:
    for options in ({}, {"launch_cooperative_grid": True}, {"num_stages": 5}, {"num_warps": 1}, {"FLAG": False}, {"BLOCK": 32}):
        go(kernel, **options)
        go(kernel, **options)
    functions = [launch[2] for launch in gpu.launches]
    assert functions[::2] == functions[1::2] and len(set(functions)) == 6
    assert [launch[4] for launch in gpu.launches[:4]] == [False, False, True, True]


def test_each_device_has_its_binary(gpu: Driver, kernel: JITFunction, go: Go) -> None:
    for device in (0, 1, 0, 1):
        gpu.device = device
        go(kernel)
    assert [launch[1] for launch in gpu.launches] == [100, 101, 100, 101]
    assert [launch[2] for launch in gpu.launches] == [1, 2, 1, 2]


def test_a_launch_runs_where_its_tensors_are(gpu: Driver, kernel: JITFunction, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def current(device: int) -> Iterator[None]:
        before, gpu.device = gpu.device, device
        yield
        gpu.device = before

    monkeypatch.setattr(torch.cuda, "device", current)
    prepared = launcher.Prepared(kernel, (3,), (64, 64), 1, FLAG=True, BLOCK=64, num_warps=4)
    for device in (0, 1, 0):
        gpu.device = device
        launcher.launch(prepared, (X, Y), (1.5,))
        assert gpu.device == device
    assert [launch[1] for launch in gpu.launches] == [101] * 3 and gpu.loaded == 1


def test_launch_hooks_fire(gpu: Driver, kernel: JITFunction, ordinary: list[None], go: Go) -> None:
    go(kernel)
    told: list[Any] = []
    knobs.runtime.launch_enter_hook.add(told.append)
    knobs.runtime.launch_exit_hook.add(told.append)
    try:
        go(kernel)
    finally:
        knobs.runtime.launch_enter_hook.remove(told.append)
        knobs.runtime.launch_exit_hook.remove(told.append)
    assert len(told) == 2 and told[0].get()["function"] == gpu.launches[0][2]
    go(kernel)
    assert len(told) == 2 and len(ordinary) == 2


def test_a_hook_in_place_of_the_chain_fires(gpu: Driver, kernel: JITFunction, monkeypatch: pytest.MonkeyPatch, go: Go) -> None:
    go(kernel)
    told: list[Any] = []
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", told.append)
    go(kernel)
    assert len(told) == 1


def test_whatever_disturbs_goes_the_ordinary_way(
    gpu: Driver, kernel: JITFunction, ordinary: list[None], monkeypatch: pytest.MonkeyPatch, go: Go
) -> None:
    go(kernel)
    go(kernel)
    assert len(ordinary) == 1
    told: list[Any] = []
    kernel.add_pre_run_hook(lambda *args, **options: told.append(args))
    go(kernel)
    assert len(ordinary) == 2 and len(told) == 1
    kernel.pre_run_hooks.clear()
    with monkeypatch.context() as patch:
        patch.setattr(knobs.runtime, "debug", True)
        go(kernel)
    assert len(ordinary) == 3
    with monkeypatch.context() as patch:
        patch.setattr(launcher, "_known", False)
        go(kernel)
    assert len(ordinary) == 4
    go(kernel)
    assert len(ordinary) == 4


def test_a_tensor_that_is_on_no_gpu_is_left_to_triton(gpu: Driver, kernel: JITFunction, ordinary: list[None], go: Go) -> None:
    """Triton asks the driver about it and says that it cannot be accessed; its address alone would be an illegal access."""
    elsewhere = torch.zeros(256)
    for x in (X, elsewhere, X, elsewhere):
        go(kernel, x=x)
    assert len(ordinary) == 3 and [launch[5][0] is elsewhere for launch in gpu.launches] == [False, True, False, True]


@pytest.mark.parametrize("how", ("all devices", "one device"))
def test_a_cleared_cache_compiles_anew(gpu: Driver, kernel: JITFunction, ordinary: list[None], how: str, go: Go) -> None:
    go(kernel)
    kernel.device_caches.clear() if how == "all devices" else kernel.device_caches[0][0].clear()
    go(kernel)
    go(kernel)
    assert [launch[2] for launch in gpu.launches] == [1, 2, 2] and len(ordinary) == 2


def test_a_changed_global_is_an_error(gpu: Driver, kernel: JITFunction, monkeypatch: pytest.MonkeyPatch, go: Go) -> None:
    go(kernel)
    monkeypatch.setitem(_scale.__globals__, "SCALE", tl.constexpr(3))
    with pytest.raises(RuntimeError, match="SCALE has changed"):
        go(kernel)


def test_the_interpreter_is_left_alone(gpu: Driver) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    class Recorded(InterpretedFunction):
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def __getitem__(self, grid: Any) -> Any:
            return lambda *args, **options: self.calls.append((grid, args, options))

    kernel = Recorded()
    for _ in range(2):
        launcher.launch(launcher.Prepared(kernel, (2,), (1,), BLOCK=4, num_warps=1), (None,), (2.0,))
    assert kernel.calls == [((2,), (None, 2.0, 1), {"BLOCK": 4, "num_warps": 1})] * 2 and not launcher._binaries


def test_arguments_out_of_order_are_an_error(gpu: Driver, kernel: JITFunction) -> None:
    with pytest.raises(TypeError, match="positional arguments"):
        launcher.launch(launcher.Prepared(kernel, (1,), (64,), stride=64, FLAG=True, BLOCK=64), (X, Y), (1.5,))


@pytest.mark.parametrize("op", ("soft_topk", "coordinate_descent"))
def test_what_is_prepared_keeps_to_one_dtype_a_tensor(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher relies on it: it does not ask for dtypes again where pointers are aligned."""
    from coordroute.kernels import coordinate_descent, soft_topk
    from coordroute.kernels.config import LaunchConfig

    config = LaunchConfig("resident", 8, 1, 1)
    seen: list[launcher.Prepared] = []
    module = soft_topk if op == "soft_topk" else coordinate_descent
    monkeypatch.setattr(module, "launch", lambda prepared, *arguments: seen.append(prepared))
    s, wide = torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float64)
    row, wide_row = torch.ones(2), torch.ones(2, dtype=torch.float64)

    def prepared(**other: Any) -> launcher.Prepared:
        given = {"g": s, "s": s, "k": row, "eps": row, "mask": None, "kept": torch.zeros(2, 3), **other}
        seen.clear()
        if op == "soft_topk":
            if "backward" in given:
                soft_topk.soft_topk_backward(given["g"], given["s"], given["kept"], given["eps"], given["mask"], config)
            else:
                soft_topk.soft_topk_forward(given["s"], given["k"], given["eps"], given["mask"], config)
        elif "backward" in given:
            coordinate_descent.coordinate_descent_backward(
                given["g"], given["s"], given["kept"], given["k"], given["mask"], 3, 0.1, 0.1, 1.0, True, config
            )
        else:
            coordinate_descent.coordinate_descent_forward(given["s"], given["k"], given["mask"], 3, 0.1, 0.1, 1.0, True, 3, config)
        return seen[-1]

    mask = torch.ones(2, 8, dtype=torch.bool)
    value = "k" if op == "coordinate_descent" else "eps"
    for forward, others in (
        (True, [{"s": wide}, {"k": wide_row}, {value: wide_row}, {"mask": mask}, {"k": 1.0}]),
        (False, [{"s": wide}, {"g": wide}, {"kept": torch.zeros(2, 3, dtype=torch.float64)}, {value: wide_row}, {"mask": mask}]),
    ):
        how = {} if forward else {"backward": True}
        first = prepared(**how)
        assert prepared(**how) is first
        for other in others:
            assert prepared(**how, **other) is not first, other
