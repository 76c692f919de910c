"""Compiled code on disk: damaged, foreign, unreadable or unwritable, it costs a compilation and never a run."""

import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import llvmlite.binding as llvm
import pytest

from kvsim.engine import code_folder, kept_code, player
from kvsim.engine.code_folder import CodeFolder, code_folders, make
from kvsim.engine.compile_beside import _runs
from kvsim.engine.machine_code import MachineCode
from kvsim.engine.state.cluster import Detour

PURPOSE, CODE = b"what it is for", bytes(range(256)) * 100
ARGUMENTS = "i8* %answer, {{i8*, i32}}** %raised, i64* %cluster, i64* %prices, i64 %only, double %at_s, i64 %events"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One that holds `CODE`."""
    kept_code.write(tmp_path / "play.code", PURPOSE, CODE)
    return tmp_path / "play.code"


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def flip_last(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def replace(path: Path) -> None:
    path.write_bytes(b"no code at all" * 100)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: list[Callable[[Path], None]] = [halve, empty, flip, flip_last, lengthen, replace, Path.unlink]


@pytest.mark.parametrize("damage", [*DAMAGES, folder])
def test_what_is_damaged_is_as_good_as_not_there(damage: Callable[[Path], None], file: Path) -> None:
    assert kept_code.read(file, PURPOSE) == CODE
    damage(file)
    assert kept_code.read(file, PURPOSE) is None


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_replaced(damage: Callable[[Path], None], file: Path) -> None:
    damage(file)
    kept_code.write(file, PURPOSE, CODE)
    assert kept_code.read(file, PURPOSE) == CODE
    assert [*file.parent.iterdir()] == [file]


def test_what_a_killed_process_left_is_replaced(file: Path) -> None:
    file.with_name("play.code.new").write_bytes(b"half")
    kept_code.write(file, PURPOSE, CODE * 2)
    assert kept_code.read(file, PURPOSE) == CODE * 2
    assert [*file.parent.iterdir()] == [file]


def test_code_for_something_else_is_not_used(file: Path) -> None:
    assert kept_code.read(file, PURPOSE + b"else") is None
    assert kept_code.read(file, b"") is None


def test_what_stands_in_the_way_is_left_there(file: Path) -> None:
    folder(file)
    with pytest.raises(OSError, match=r"play\.code"):
        kept_code.write(file, PURPOSE, CODE)
    assert [*file.parent.iterdir()] == [file]


def test_a_full_disk(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from kvsim.engine import kept_code\n"
    program += (
        "try: kept_code.write(Path(sys.argv[1]), b'', bytes(10000))\nexcept OSError as error: print(error.strerror)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "play.code")],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    assert not [*tmp_path.iterdir()]


def test_a_reader_sees_one_writer_s_code_or_another_s(file: Path) -> None:
    """Writers take turns, as those that compile do; readers know nothing of them."""
    codes = [bytes([i]) * 100_000 for i in range(4)]
    done = threading.Event()

    def write() -> None:
        for i in range(100):
            kept_code.write(file, PURPOSE, codes[i % 4])
        done.set()

    writer = threading.Thread(target=write)
    kept_code.write(file, PURPOSE, codes[0])
    writer.start()
    while not done.is_set():
        assert kept_code.read(file, PURPOSE) in codes
    writer.join()


# -- folders ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], CodeFolder]]:
    """The folder of the core on a machine with some processor; all machines share a disk."""

    def folder_of(name: str) -> CodeFolder:
        monkeypatch.setattr(llvm, "get_host_cpu_name", lambda: name)
        code_folder._digest.cache_clear()
        return code_folders(())[0]

    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    yield folder_of
    code_folder._digest.cache_clear()


def test_machines_that_share_a_disk_run_code_for_their_own_processor(
    processor: Callable[[str], CodeFolder],
) -> None:
    own = processor("znver4")
    assert make(own)
    own.keep(CODE, "layouts")
    assert own.read("layouts") == CODE
    other = processor("skylake")
    assert other.path != own.path
    assert other.read("layouts") is None
    assert make(other)
    (other.path / "play.code").write_bytes((own.path / "play.code").read_bytes())  # copied by hand
    assert other.read("layouts") is None
    assert processor("znver4").read("layouts") == CODE


def test_code_is_for_a_layout_of_the_state(processor: Callable[[str], CodeFolder]) -> None:
    own = processor("znver4")
    assert make(own)
    own.keep(CODE, "layouts")
    assert own.read("other layouts") is None


# -- code that is loaded ---------------------------------------------------------------------------------------------


def object_code(body: str, declared: str = "") -> bytes:
    """What `compiled` returns, for a function of the same signature with this body."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    source = f"{declared}\ndefine i32 @play({ARGUMENTS.format()}) {{\n{body}\n}}\n"
    machine = llvm.Target.from_default_triple().create_target_machine(codemodel="jitdefault", jit=True)
    return b"play\n" + machine.emit_object(llvm.parse_assembly(source))


def test_code_is_called_as_numba_calls_it() -> None:
    """It answers whether it was given 3 events of replica 7 at 2.5 s."""
    events, only, time = "icmp eq i64 %events, 3", "icmp eq i64 %only, 7", "fcmp oeq double %at_s, 2.5"
    body = f"%a = {events}\n%b = {only}\n%c = {time}\n%d = and i1 %a, %b\n%e = and i1 %d, %c\n%f = zext i1 %e to i8\n"
    code = MachineCode(object_code(f"{body} store i8 %f, i8* %answer\n ret i32 0"))
    state = code.references((), ())
    assert code.play(*state, 7, 2.5, 3) is True
    assert [code.play(*state, *given) for given in ((7, 2.5, 2), (6, 2.5, 3), (7, 2.0, 3))] == [False] * 3


@pytest.mark.parametrize("error", [Detour(), ZeroDivisionError("division by zero")])
def test_what_code_raises_is_raised(error: Exception) -> None:
    pickled = pickle.dumps((type(error), error.args, ("play", "loop.py", 1)))
    text = "".join(f"\\{byte:02x}" for byte in pickled)
    size = len(pickled)
    declared = f'@text = constant [{size} x i8] c"{text}"\n@what = constant {{i8*, i32}} '
    declared += f"{{i8* getelementptr ([{size} x i8], [{size} x i8]* @text, i64 0, i64 0), i32 {size}}}"
    code = MachineCode(object_code("store {i8*, i32}* @what, {i8*, i32}** %raised\n ret i32 1", declared))
    with pytest.raises(type(error)) as raised:
        code.play(*code.references((), ()), 0, 0.0, 1)
    assert raised.value.args == error.args


def test_a_status_that_means_nothing_is_an_error() -> None:
    code = MachineCode(object_code("ret i32 -1"))
    with pytest.raises(RuntimeError, match="returned -1"):
        code.play(*code.references((), ()), 0, 0.0, 1)


def test_code_is_tried_out_in_a_process_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    """What it returns for no event is known; whatever it calls must be there, if only for later."""
    first = "%none = icmp eq i64 %events, 0\nbr i1 %none, label %end, label %goes_on\n"
    first += "end:\nstore i8 1, i8* %answer\nret i32 0\ngoes_on:\n"
    assert _runs(object_code(f"{first} %a = call i32 @abs(i32 0)\nret i32 %a", "declare i32 @abs(i32)"), 10, 10)
    assert not capfd.readouterr().err
    assert not _runs(object_code(f"{first} %a = call i32 @nobody_has()\nret i32 %a", "declare i32 @nobody_has()"), 1, 1)
    assert "nobody_has" in capfd.readouterr().err
    assert not _runs(object_code("store i8 0, i8* %answer\n ret i32 0"), 10, 10)
    assert not _runs(object_code("store i8 1, i8* null\n ret i32 0"), 10, 10)  # which ends its process


def test_code_that_cannot_be_linked_here_is_as_good_as_not_there(processor: Callable[[str], CodeFolder]) -> None:
    place = processor("x86-64")
    assert make(place)
    place.keep(object_code("call void @nobody_has_this() ret i32 0", "declare void @nobody_has_this()"), "")
    assert place.read("") is not None
    assert player._load(place, "") is None
