"""Which programs JAX compiles."""

import collections
import contextlib

import jax

_recording: list[collections.Counter[str]] = []


def _record(event, duration_secs, **names):
    if event == "/jax/core/compile/backend_compile_duration":
        for counter in _recording:
            counter[names["fun_name"]] += 1


jax.monitoring.register_event_duration_secs_listener(_record)


@contextlib.contextmanager
def compiled_programs():
    """Yields a counter of the programs that are compiled inside, by their names."""
    counter: collections.Counter[str] = collections.Counter()
    _recording.append(counter)
    try:
        yield counter
    finally:
        _recording.remove(counter)
