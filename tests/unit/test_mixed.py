"""Classes of ours mixed into vLLM's or the user's: a path leads to them in any process, and they are checked."""

from __future__ import annotations

import abc
import pickle
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_calidrop.compat import SUPPORTED_VLLM
from vllm_calidrop.hooks import mixed
from vllm_calidrop.hooks.engine import kv_cache_manager, scheduler, worker
from vllm_calidrop.hooks.mixed import Mixture
from vllm_calidrop.hooks.wrap import HookError


class Base:
    def step(self, output: int) -> int:
        return output


class Doubling:
    def step(self, output: int) -> int:
        return 2 * super().step(output)  # type: ignore[misc]


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(__name__, Doubling, (f"{__name__}.Base",), {"step": ("self", "output")})


def test_ours_runs_first_and_reaches_what_it_is_mixed_with(mixture: Mixture) -> None:
    class Users(Base):
        def step(self, output: int) -> int:
            return super().step(output) + 1

    assert mixture.of(Base)().step(3) == 6
    assert mixture.of(Users)().step(3) == 8, "the user's own method runs, too"
    assert issubclass(mixture.of(Users), Users)
    assert mixture.of(Base) is mixture.of(Base)


def test_a_path_leads_to_the_class_and_back(mixture: Mixture) -> None:
    path = mixture.path_of(f"{__name__}.Base")
    assert path == mixture.path_of(Base)
    assert path.startswith(f"{__name__}.") and mixture.base_path(path) == f"{__name__}.Base"
    assert mixture.by_name(path.rpartition(".")[2]) is mixture.of(Base)
    for other in (None, Base, f"{__name__}.Base"):
        assert mixture.base_path(other) is None
    with pytest.raises(AttributeError, match="other"):
        mixture.by_name("other")


def test_a_class_that_no_path_leads_to_is_found_in_its_own_process(mixture: Mixture) -> None:
    class Local(Base):
        pass

    assert issubclass(mixture.by_name(mixture.path_of(Local).removeprefix(f"{__name__}.")), Local)


def test_what_does_not_fit_is_an_error_that_names_it(mixture: Mixture) -> None:
    class PassingOn(Base):
        def step(self, *args: int, **kwargs: int) -> int:
            return super().step(*args, **kwargs)

    class Renamed(Base):
        def step(self, result: int) -> int:  # type: ignore[override]
            return result

    class Demanding(Base, abc.ABC):
        @abc.abstractmethod
        def added_later(self) -> None: ...

    assert mixture.of(PassingOn)().step(3) == 6
    for base, named in (
        (type("Without", (), {}), r"Without\.step does not exist"),
        (Renamed, r"Renamed\.step takes \(self, result\), expected it to begin with \(self, output\)"),
        (Demanding, "added_later"),
    ):
        with pytest.raises(HookError, match=named) as refusal:
            mixture.of(base)
        assert SUPPORTED_VLLM in str(refusal.value)


@pytest.mark.parametrize(
    "part", [scheduler, worker, kv_cache_manager], ids=lambda part: part.__name__.rpartition(".")[2]
)
def test_every_method_that_is_overridden_is_checked(part: Any) -> None:
    """A method of the mixin that vLLM no longer has would never run."""
    mixture = part.MIXTURE
    added = {"calidrop_allocate"}  # called by name
    methods = {name for name, value in vars(mixture.mixin).items() if callable(value)}
    assert methods - added == set(mixture.methods)
    for name in mixture.methods:
        theirs = {other: lambda self: None for other in mixture.methods if other != name}
        checks = {other: expected for other, expected in mixture.methods.items() if other == name}
        only_this = mixed.Mixture(mixture.module, mixture.mixin, (), checks)
        if name != "__init__":  # every class has that one
            with pytest.raises(HookError, match=f"{name} does not exist"):
                only_this.of(type(f"Without_{name}", (), theirs))
        if len(mixture.methods[name]) > 1:
            with pytest.raises(HookError, match=rf"{name} takes \(self, renamed\)"):
                only_this.of(type(f"Renamed_{name}", (), theirs | {name: lambda self, renamed: None}))


def config(scheduler_cls: Any = None, asynchronous: bool = False, worker_cls: str = "vllm.some.Worker") -> Any:
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(scheduler_cls=scheduler_cls, async_scheduling=asynchronous),
        parallel_config=SimpleNamespace(worker_cls=worker_cls),
    )


def test_the_scheduler_follows_the_configuration_when_it_is_rebuilt() -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    given = config()
    for asynchronous in (False, True, True, False):
        given.scheduler_config.async_scheduling = asynchronous
        scheduler.use_our_scheduler(given)
        chosen = resolve_obj_by_qualname(given.scheduler_config.scheduler_cls)
        assert issubclass(chosen, scheduler.CompressingScheduler)
        assert issubclass(chosen, AsyncScheduler) is asynchronous
        assert chosen.__mro__.count(scheduler.CompressingScheduler) == 1


@pytest.mark.parametrize("as_path", [True, False])
def test_the_users_own_scheduler_stays(as_path: bool) -> None:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from tests.support.own_classes import CountingScheduler

    given = config("tests.support.own_classes.CountingScheduler" if as_path else CountingScheduler)
    for _ in range(2):
        scheduler.use_our_scheduler(given)
        assert issubclass(resolve_obj_by_qualname(given.scheduler_config.scheduler_cls), CountingScheduler)


def test_the_worker_that_the_platform_chose_is_the_one_below() -> None:
    given = config(worker_cls="vllm.v1.worker.gpu_worker.Worker")
    for _ in range(2):
        worker.use_our_worker(given)
        assert worker.MIXTURE.base_path(given.parallel_config.worker_cls) == "vllm.v1.worker.gpu_worker.Worker"


def test_a_process_that_never_made_the_class_unpickles_it() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    sent = pickle.dumps(scheduler.MIXTURE.of(Scheduler))
    code = "import pickle, sys; print(pickle.loads(bytes.fromhex(sys.argv[1])).__mro__[2].__name__)"
    run = subprocess.run([sys.executable, "-c", code, sent.hex()], capture_output=True, text=True, check=False)
    assert run.stdout.split()[-1:] == ["Scheduler"], run.stderr[-2000:]
