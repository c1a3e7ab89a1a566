"""Work that is done in turns, so that a notebook can listen to its reader in between."""

import threading
from collections.abc import Callable

import torch


class Turns:
    """A function in a thread of its own, which goes on only while somebody waits for it.

    The function is given `rest`, and calls it between two turns. As nothing else runs during a turn, and the function
    leaves models as they are when it rests, cells of a notebook can use them in the meantime. Random numbers of the
    function go on where they were, whatever others draw.

    Attributes:
        ended: Whether the function has come to its end.
    """

    def __init__(self, work: Callable[[Callable[[], None]], None]) -> None:
        """Makes the thread; nothing is done yet.

        Args:
            work: The function.
        """
        self.ended = False
        self._work, self._error = work, None
        self._go, self._rested = threading.Semaphore(0), threading.Semaphore(0)
        self._random = _random_states()
        self._thread = threading.Thread(target=self._run, daemon=True, name="llama4lab turns")
        self._thread.start()

    def turn(self) -> bool:
        """Lets the function work until it rests. Gives whether there is more to do; its errors come out here."""
        if self.ended:
            return False
        others = _random_states()
        _set_random(self._random)
        self._go.release()
        try:
            self._rested.acquire()
        except BaseException:  # an interrupt: the turn is ended before, for a model in the middle of a pass is no good
            self._rested.acquire()
            raise
        finally:
            self._random = _random_states()
            _set_random(others)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return not self.ended

    def _run(self) -> None:
        self._go.acquire()
        try:
            self._work(self._rest)
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._rested.release()

    def _rest(self) -> None:
        self._rested.release()
        self._go.acquire()


def _random_states() -> list[torch.Tensor]:
    own = [torch.get_rng_state()]
    return own + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def _set_random(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
