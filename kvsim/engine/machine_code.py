"""Machine code of `loop.play` in this process, by LLVM alone: numba, which has compiled it, is not needed to run it.

    python -m kvsim.engine.machine_code CLUSTER_WORDS PRICES_WORDS < CODE

tries code out in a process of its own: 0 where it can be loaded and called.
"""

import ctypes
import pickle
import sys
from typing import Any

import llvmlite.binding as llvm
import numpy as np

from kvsim.engine.state.words import words_of

_ENDED, _RAISED = 0, 1  # what numba's code returns: its answer or an exception are where its first arguments say


class _Raised(ctypes.Structure):
    """How numba's code names an exception: a pickle of its type, its arguments and where it was raised."""

    _fields_ = (("pickled", ctypes.c_void_p), ("n_bytes", ctypes.c_int32))


_PLAY = ctypes.PYFUNCTYPE(
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_int8),
    ctypes.POINTER(ctypes.POINTER(_Raised)),
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_double,
    ctypes.c_int64,
)


class Reference:
    """A named tuple of arrays as machine code takes it, good for as long as these stay where they are."""

    def __init__(self, parts: Any) -> None:
        self.parts, self.words = parts, words_of(parts)
        self.address = self.words.ctypes.data


class MachineCode:
    """`loop.play` compiled, from the name of its function, a line's end, and an object file.

    RuntimeError where the code calls what this process has not.
    """

    def __init__(self, code: bytes) -> None:
        name, _, content = code.partition(b"\n")
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        machine = llvm.Target.from_default_triple().create_target_machine(jit=True)
        linker = llvm.JITLibraryBuilder().add_object_img(content).add_current_process().export_symbol(name.decode())
        self._jit = llvm.create_lljit_compiler(machine)
        self._library = linker.link(self._jit, "loop")  # which is in memory for as long as this is
        self._play = _PLAY(self._library[name.decode()])

    def references(self, cluster: Any, prices: Any) -> tuple[Reference, Reference]:
        """What `play` takes in place of these."""
        return Reference(cluster), Reference(prices)

    def play(self, cluster: Reference, prices: Reference, only: int, at_s: float, most_events: int) -> bool:
        """As `loop.play`, whose exceptions it raises."""
        return self._called(cluster.address, prices.address, only, at_s, most_events)

    def try_out(self, cluster_words: int, prices_words: int) -> bool:
        """Whether it can be called, for no event of states of so many words."""
        cluster, prices = np.zeros(cluster_words, np.int64), np.zeros(prices_words, np.int64)
        return self._called(cluster.ctypes.data, prices.ctypes.data, 0, 0.0, 0)

    def _called(self, *arguments: Any) -> bool:
        answer, raised = ctypes.c_int8(), ctypes.POINTER(_Raised)()
        status = self._play(ctypes.byref(answer), ctypes.byref(raised), *arguments)
        if status == _ENDED:
            return bool(answer.value)
        if status == _RAISED:
            what = raised.contents
            kind, given, _ = pickle.loads(ctypes.string_at(what.pickled, what.n_bytes))  # noqa: S301 - of our own code
            raise kind(*given or ())
        raise RuntimeError(f"the compiled simulator returned {status}")


if __name__ == "__main__":
    sys.exit(not MachineCode(sys.stdin.buffer.read()).try_out(*map(int, sys.argv[1:])))
