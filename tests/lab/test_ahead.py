import threading

import pytest

from bn_jax.lab.training.ahead import prepare_ahead


def test_each_item_comes_in_its_order_with_what_was_prepared():
    assert list(prepare_ahead(str, range(5))) == [(number, str(number)) for number in range(5)]
    assert list(prepare_ahead(str, [])) == []


def test_the_next_item_is_prepared_while_the_caller_works():
    begun = {number: threading.Event() for number in range(3)}

    def prepare(number):
        begun[number].set()
        return threading.current_thread()

    for number, thread in prepare_ahead(prepare, range(3)):
        assert thread is not threading.current_thread()
        if number < 2:
            assert begun[number + 1].wait(timeout=60)
        # No more than one: its state waits in memory.
        assert not any(begun[later].is_set() for later in range(number + 2, 3))


def test_an_error_comes_when_it_is_the_turn_of_its_item():
    prepared = prepare_ahead(lambda number: 1 / number, (2, 0, 1))
    assert next(prepared) == (2, 0.5)
    with pytest.raises(ZeroDivisionError):
        next(prepared)


def test_a_caller_that_stops_leaves_nothing_to_do():
    begun: list[int] = []
    prepared = prepare_ahead(begun.append, range(10))
    next(prepared)
    prepared.close()
    for thread in threading.enumerate():
        if thread.name.startswith("prepare"):
            thread.join(timeout=60)
    assert begun in ([0], [0, 1])
