"""What a store of weights on disk did, in numbers."""

from dataclasses import dataclass, fields


@dataclass
class Traffic:
    """Counts of a store.

    Attributes:
        asked: How often a matrix was asked for.
        on_device: How often it was on the device.
        in_ram: How often it was in RAM.
        read: How many matrices were read from their files.
        rows: How many rows of embedding tables were.
        bytes_read: How many bytes that were, rows included.
        seconds_reading: How long they were read.
        seconds_waiting: How long products waited for a matrix.
    """

    asked: int = 0
    on_device: int = 0
    in_ram: int = 0
    read: int = 0
    rows: int = 0
    bytes_read: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0

    @property
    def hit_rate(self) -> float:
        """The share of what was asked for that did not have to be read."""
        return (self.on_device + self.in_ram) / self.asked if self.asked else 0.0

    def reset(self) -> None:
        """Sets all counts to 0."""
        for each in fields(self):
            setattr(self, each.name, each.default)
