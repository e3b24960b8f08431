"""Hooks into Triton's interpreter: random stalls between the steps of a rank, and a record of what a kernel did to a pad."""
import contextlib
import random
import time

from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder

DONE = 2**20                                                          # an epoch no test reaches


def _once(patch):
    """Triton patches its language anew in every call of a device function: a millisecond each, most of a kernel's time here. Once a
    launch for each module that calls it is enough."""
    patched = set()

    def run(fn):
        if fn.__module__ in patched:
            return None                                               # a device function: the caller looks at no scope
        scope = patch(fn)
        if not patched:                                               # the launch: it restores the language at its end
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(fn.__module__)
        return scope
    return run


interpreter._patch_lang = _once(interpreter._patch_lang)


def _patched(**methods):
    stack = contextlib.ExitStack()
    for name, make in methods.items():
        original = getattr(Builder, name)
        setattr(Builder, name, make(original))
        stack.callback(setattr, Builder, name, original)
    return stack


def _is_poll(value):
    return value.data.size == 1 and not value.data.any()


def stalls(seed, after_signal=0.0):
    """Within it this process dawdles at random before stores, loads and signals, `after_signal` seconds after each signal, and
    sleeps between polls, longer and longer: ranks outnumber cores. Also the only way to make one rank reliably late."""
    dice, polled = random.Random(seed), {}                            # how often since this process last did anything else

    def pause(odds, seconds):
        if dice.random() < odds:
            time.sleep(dice.random() * seconds)

    def memory(original):
        def run(self, *args):
            pause(0.03, 0.004)
            return original(self, *args)
        return run

    def atomic(original):
        def run(self, op, ptr, value, mask, sem, scope):
            at, poll = int(ptr.data.ravel()[0]), _is_poll(value)
            if poll:
                if times := polled.get(at):
                    time.sleep(0.00025 * min(times, 16))
                polled[at] = polled.get(at, 0) + 1
            else:
                pause(0.2, 0.01)
                polled.clear()
            out = original(self, op, ptr, value, mask, sem, scope)
            if after_signal and "XCHG" in str(op):
                time.sleep(after_signal)
            return out
        return run
    return _patched(create_atomic_rmw=atomic, create_masked_store=memory, create_masked_load=memory)


@contextlib.contextmanager
def recorded(pads, cell):
    """The writes, signals, waits and reads of one rank's kernels on `pads`, in order: (do, rank, buffer, slot). `cell` bytes make a
    data slot. Flags must be set to DONE: nobody else runs."""
    events = []
    base = [p.memory.data_ptr() for p in pads]

    def note(do, address):
        for rank, (first, pad) in enumerate(zip(base, pads)):
            offset = address - first
            if 0 <= offset < pad.data:
                events.append((do, rank, 0, offset // 4))
            elif pad.data <= offset < pad.total:
                buffer, at = divmod(offset - pad.data, pad.nbytes)
                events.append((do, rank, buffer, at // cell))

    def store(original):
        def run(self, ptrs, value, mask, *rest):
            if mask.data.any():
                note("write", int(ptrs.data[mask.data].ravel()[0]))
            return original(self, ptrs, value, mask, *rest)
        return run

    def load(original):
        def run(self, ptrs, mask, *rest):
            if mask.data.any():
                note("read", int(ptrs.data[mask.data].ravel()[0]))
            return original(self, ptrs, mask, *rest)
        return run

    def atomic(original):
        def run(self, op, ptr, value, *rest):
            note("wait" if _is_poll(value) else "signal", int(ptr.data.ravel()[0]))
            return original(self, op, ptr, value, *rest)
        return run
    with _patched(create_atomic_rmw=atomic, create_masked_store=store, create_masked_load=load):
        yield events
