"""What is held of a store on one device, within a budget."""

from collections import OrderedDict

from llama4lab.model.packed_matrix import PackedMatrix

Key = tuple[str, int]  # the name of a tensor in the model, and the expert (0 where there are none)


class Tier:
    """Matrices up to a budget in bytes.

    What every pass uses stays when it is there: whatever gave it room would be gone before its turn came again. Of the
    others, experts, the one that was not used for longest goes first.

    Attributes:
        budget: The most bytes.
        nbytes: Those that are held.
        held: The matrices, the one that was not used for longest first.
    """

    def __init__(self, budget: int):
        self.budget, self.nbytes = budget, 0
        self.held: OrderedDict[Key, PackedMatrix] = OrderedDict()
        self._steady: set[Key] = set()
        self._steady_nbytes = 0

    def get(self, key: Key) -> PackedMatrix | None:
        """Gives what is held under a key, and counts that as a use."""
        if key in self.held:
            self.held.move_to_end(key)
        return self.held.get(key)

    def put(self, key: Key, matrix: PackedMatrix, *, steady: bool = False) -> None:
        """Holds a matrix, if there is room or some can be made.

        Args:
            key: To find it by.
            matrix: The matrix.
            steady: Whether every pass uses it.
        """
        if key in self.held or not self.make_room(matrix.nbytes):
            return
        self.held[key] = matrix
        self.nbytes += matrix.nbytes
        if steady:
            self._steady.add(key)
            self._steady_nbytes += matrix.nbytes

    def make_room(self, nbytes: int) -> bool:
        """Drops matrices until so many bytes are free, and says whether they are; if they cannot be, drops none."""
        if nbytes > self.budget - self._steady_nbytes:
            return False
        while self.nbytes + nbytes > self.budget:
            oldest = next(key for key in self.held if key not in self._steady)
            self.nbytes -= self.held.pop(oldest).nbytes
        return True
