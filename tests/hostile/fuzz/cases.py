"""One case: a hostile folder, what is done with it, and what came of it.

A case may be read or refused by a child of MoEError, within limits of time and memory. It must not make us open a file
that is not the model's, load a pickle, run code, or print what a terminal would obey.
"""

import builtins
import io
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import chuk_lazarus
from chuk_lazarus.introspection.moe import (
    Experts,
    MoECompressionService,
    MoEError,
    MoELayoutService,
    MoESurveyService,
    MoETypeService,
    SurveyRow,
)
from chuk_lazarus.introspection.moe.overlays.checkpoint.reader import read_overlay
from chuk_lazarus.introspection.moe.provenance import survey
from chuk_lazarus.introspection.moe.weights.repositories import hub

from .corpus import (
    JOBS,
    REPOSITORY,
    SURVEYED,
    Parser,
    Seed,
    fixture_files,
    kept_seeds,
    model_seeds,
    overlay_seeds,
    read_folder,
    survey_seeds,
    write_folder,
)
from .mutations import OUTSIDE, Case, Link, mutate

CPU_SECONDS = 1.0
HANGS_AFTER = 20.0  # seconds of CPU time
WAITS_AFTER = 300.0  # seconds on the clock, for a case that waits for something
MEMORY = 64 * 2**20  # bytes that any case may take, and so many more for each byte of its files
MEMORY_PER_BYTE = 64

LONGEST_LINE = 5000  # characters of an error
CANARY = "import builtins\nbuiltins.canary_sang = True\nclass Config: pass\nclass Model: pass\n"
PICKLE = b"cbuiltins\nexec\n(S'import builtins; builtins.canary_sang = True'\ntR."
OK = ("read", "InvalidRequest", "ModelUnreadable", "NotMoE", "UnknownFormat")


class Hangs(BaseException):
    """Raised in a case that takes far too long."""


SECRET = b"a secret that no output may hold"


@dataclass
class Outcome:
    """What came of a case: one of OK, or crash, slow, memory, outside, code, escape; with seconds of CPU time and the
    bytes by which the process grew at most."""

    kind: str
    detail: str = ""
    seconds: float = 0.0
    memory: int = 0


@dataclass
class Auditor:
    """Sees each file that is opened while a case runs, and each attempt to load a pickle or to run something."""

    allowed: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list)
    active: bool = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(self.allowed):
                self.seen.append(f"outside: {path}")
        elif event in ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen"):
            self.seen.append(f"code: {event} {arguments[:2]}")


@contextmanager
def deadline() -> Iterator[None]:
    """Raise Hangs in what takes or waits far too long."""

    def ring(number: int, frame: Any) -> None:
        raise Hangs

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, HANGS_AFTER), (signal.ITIMER_REAL, signal.SIGALRM, WAITS_AFTER))
    before = [signal.signal(number, ring) for _, number, _ in timers]
    try:
        for timer, _, seconds in timers:
            signal.setitimer(timer, seconds)
        yield
    finally:
        for (timer, number, _), handler in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def resident_peak(reset: bool = False) -> int:
    """The largest resident size since the last reset, in bytes; systems other than Linux never reset it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Bench:
    """The place where cases run: a folder with a model, or what else a case is about, and all that lies beside it."""

    def __init__(self, root: Path, *services: Path) -> None:
        """`services` are the folders of the Hub's client and of the server that it talks to."""
        self.root, self.service_folders = root, services
        self.model, self.outside, self.target = root / "model", root / "outside", root / "written/folder"
        self.cache, self.beside, self.kept_model = root / "cache", root / "beside", root / "kept-model"
        for folder in (self.outside, self.kept_model):
            write_folder(folder, fixture_files("mixtral") | {"secret": SECRET, "m.gguf": b"GGUF"})
        self.auditor = Auditor()
        sys.addaudithook(self.auditor)

    def seeds(self) -> list[Seed]:
        """The whole corpus; what is imported late is imported while it is made."""
        for service in self.services_for(str(self.kept_model)):
            show(service())
        scratch = self.root / "scratch"
        seeds = [
            *model_seeds(scratch / "models"),
            *overlay_seeds(scratch / "overlays"),
            *kept_seeds(str(self.kept_model), self.cache, self.beside),
            *survey_seeds(scratch / "survey"),
        ]
        if self.is_connected:
            shutil.rmtree(self.cache)
            self.truth = read_everything(REPOSITORY)
            seeds.append(
                Seed("ranges and notes", "cache", {f"cache/{k}": v for k, v in read_folder(self.cache).items()})
            )
        return seeds

    @property
    def is_connected(self) -> bool:
        """Whether the Hub is a loopback server that has our repository."""
        return hub.ENDPOINT.startswith("http://127.0.0.1:")

    def run(self, seed: Seed, random: Random) -> tuple[Case, Outcome]:
        """Make a case of a seed, and see what comes of it."""
        case = mutate(random, seed.parser, seed.files)
        self.make(seed.parser, case)
        return case, self.judge(
            lambda: self.drive(seed, random), sum(len(x) for x in case.values() if isinstance(x, bytes))
        )

    def make(self, parser: Parser, case: Case) -> None:
        """Write the files of a case where they belong."""
        for folder in (self.model, self.target.parent, self.cache, self.beside):
            shutil.rmtree(folder, ignore_errors=True)
        home = self.root if parser in ("kept", "cache") else self.model
        home.mkdir(exist_ok=True)
        if home is self.model:
            write_folder(home, {"canary.py": CANARY.encode(), "pytorch_model.bin": PICKLE})
        for name, content in case.items():
            with suppress(OSError, ValueError):  # a name that this file system can't have
                place = home / name
                place.parent.mkdir(parents=True, exist_ok=True)
                if place.exists():
                    place.unlink()
                if isinstance(content, bytes):
                    place.write_bytes(content)
                elif isinstance(content, Link):
                    place.symlink_to(content.target.replace(OUTSIDE, str(self.outside)))
                elif content.kind == "fifo":
                    os.mkfifo(place)
                elif content.kind == "socket":
                    with socket.socket(socket.AF_UNIX) as own:
                        own.bind(os.path.relpath(place))
                else:
                    place.mkdir()

    def judge(self, drive: Callable[[], None], size: int, cpu_seconds: float = CPU_SECONDS) -> Outcome:
        """Run something under the limits."""
        inside = (self.model, self.target.parent, self.cache, self.beside, self.kept_model, *self.service_folders)
        package = Path(chuk_lazarus.__file__).parent
        linked = [path for path in self.model.rglob("*") if path.is_symlink()]  # which are followed for reading
        places = [
            *map(str, (*inside, *linked)),
            str(package),
            sys.prefix,
            sys.base_prefix,
            os.devnull,
            "/proc/",
            "/sys/",
        ]
        self.auditor.allowed, self.auditor.seen = tuple(map(os.path.realpath, places[:-3])) + tuple(places[-3:]), []
        before, started = resident_peak(reset=True), time.process_time()
        outcome = Outcome("read")
        self.auditor.active = True
        try:
            with deadline(), patch.object(hub, "RETRY_DELAYS", ()), warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of numbers that overflow, on the terminal
                drive()
        except MoEError as error:
            kind = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in OK)
            is_line = str(error).isprintable() and len(str(error)) <= LONGEST_LINE
            outcome = Outcome(kind if is_line else "escape", str(error)[:LONGEST_LINE])
        except Hangs:
            outcome = Outcome("slow", traceback.format_exc())
        except Exception:
            outcome = Outcome("crash", traceback.format_exc())
        finally:
            self.auditor.active = False
        outcome.seconds = time.process_time() - started
        outcome.memory = max(0, resident_peak() - before)
        if any(SECRET in path.read_bytes() for path in self.target.rglob("*") if path.is_file()):
            self.auditor.seen.append("outside: what a link leads to was copied")
        if getattr(builtins, "canary_sang", False):
            del builtins.canary_sang  # type: ignore[attr-defined]
            self.auditor.seen.append("code: the canary was imported")
        if outcome.kind in OK and self.auditor.seen:
            outcome.kind, outcome.detail = self.auditor.seen[0].partition(":")[0], "\n".join(self.auditor.seen)
        if outcome.kind in OK and outcome.seconds > cpu_seconds:
            outcome.kind = "slow"
        if outcome.kind in OK and outcome.memory > MEMORY + MEMORY_PER_BYTE * size:
            outcome.kind = "memory"
        return outcome

    def drive(self, seed: Seed, random: Random) -> None:
        """Do with a case what users do."""
        match seed.parser:
            case "kept":
                job, _ = JOBS[seed.name]
                job(str(self.kept_model), self.beside / "folder", lambda what, done, total: None)
            case "cache":
                with patch("huggingface_hub.constants.HF_HUB_OFFLINE", random.random() < 0.5):
                    found = read_everything(REPOSITORY)
                if found != self.truth:
                    raise AssertionError("a damaged cache changes what is read")
            case "survey":
                self.drive_survey(seed.name)
            case "overlay":
                overlay = read_overlay(self.model)
                for layer in overlay.layers[:2]:
                    overlay.expert(layer, overlay.count(layer) - 1)
                show(MoECompressionService.export(self.model, self.target))
                read_everything(str(self.target))
            case _:
                self.drive_model(random)

    def drive_survey(self, kind: str) -> None:
        """Plan what a list names; go on with rows, where a model that they do not answer for counts as failed."""

        def give_up(entries: Any, jobs: int, progress: Any, finish: Callable[[Any, None], None], keep: bool) -> None:
            for entry in entries:
                error = {"code": 1, "message": "not analysed", "hint": ""}
                finish(SurveyRow(request=entry.shown, stated=None, answer=None, error=error), None)

        if kind != "rows":
            show(MoESurveyService.plan([str(path) for path in sorted(self.model.glob("list.*"))]))
            return
        with patch.object(survey, "_analyze_in_processes", give_up):
            found = MoESurveyService.survey(SURVEYED, file=self.model / "rows.jsonl")
        show(found)
        show(found, found.summary())

    def drive_model(self, random: Random) -> None:
        model = str(self.model)
        if random.random() < 0.1:  # a single file of it
            model = str(random.choice([path for path in sorted(self.model.iterdir()) if not path.is_symlink()]))
        kind = random.choice(("routed", "routed", "routed", "shared", "dense"))
        read_everything(model, kind)
        for service in random.sample(self.services_for(model), random.choice((1, 1, 2))):
            show(service())

    def services_for(self, model: str) -> list[Callable[[], Any]]:
        """Everything that is done with a model."""
        return [
            lambda: MoELayoutService.describe(model),
            lambda: MoELayoutService.describe(model, layers="all"),
            lambda: MoETypeService.analyze(model),
            lambda: MoETypeService.analyze(model, layers="all", experts=None),
            lambda: MoETypeService.quick(model),
            lambda: MoECompressionService.compute(model),
            lambda: MoECompressionService.verify(model, inputs=8),
            lambda: MoECompressionService.estimate(model),
            lambda: MoECompressionService.compress(model, self.target, energy=0.5),
        ]


def read_everything(model: str, kind: Any = "routed") -> list[Any]:
    """Whatever can be asked of a model's experts."""
    experts = Experts.open(model, kind)
    found: list[Any] = [experts.activation, experts.top_k, experts.scoring, experts.stacks, experts.model_type]
    for number in [*experts.layers[:2], *experts.mtp_layers[:1]]:
        layer = experts.layer(number)
        found += [layer.sizes, layer.storage, layer.stored_bytes, layer.left_out]
        for expert in {0, layer.count - 1}:
            for parts in (layer.matrices(expert), layer.biases(expert)):
                found += [(role, values.shape, values.tobytes()) for role, values in parts.items()]
        found += [repr(layer.router()), repr(layer.norm())]
    return found


def show(report: Any, *more: Any) -> None:
    """A report as a table and as JSON; raises where a terminal would obey it."""
    from chuk_lazarus.cli.output import format_json, show

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), patch.dict(os.environ, {"COLUMNS": "100"}):
        show(report, False, None, more)
    for text in (out.getvalue(), format_json(report.model_dump(mode="json"))):
        text.encode()
        if odd := {char for char in text if not char.isprintable() and char != "\n"}:
            raise AssertionError(f"it prints {odd!a}")
