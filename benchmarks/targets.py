"""What a block and a multiprocessor of each GPU may have, and how many blocks fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A GPU: a compiler's names for it, and its limits.

    shared: bytes a block may have; shared_all: bytes of a multiprocessor, of which each block also
    takes `reserved`. warps, blocks: resident at once. registers: those of a multiprocessor, in
    `parts` files, each given out in units of `granule` registers a thread.
    """

    platform: str  # "cuda" or "hip"
    arch: int | str
    shared: int
    shared_all: int
    reserved: int
    warps: int
    blocks: int
    warp_size: int = 32
    registers: int = 65536
    parts: int = 4
    granule: int = 8

    def occupancy(self, warps: int, registers: int, shared: int, tensor_columns: int = 0) -> float:
        """Resident warps ÷ the most there can be, for blocks of so many warps and so on.

        tensor_columns: of the 512 of sm_100's tensor memory.
        """
        a_thread = max(self.granule, -(-registers // self.granule) * self.granule)
        by_registers = self.registers // self.parts // (a_thread * self.warp_size) * self.parts
        blocks = [
            self.blocks,
            self.warps // warps,
            by_registers // warps,
            self.shared_all // (shared + self.reserved) if shared + self.reserved else self.blocks,
            512 // tensor_columns if tensor_columns else self.blocks,
        ]
        return min(blocks) * warps / self.warps


# Sources: the CUDA programming guide's table of compute capabilities; AMD's CDNA3 ISA guide (a
# compute unit has four SIMDs of 512 registers in each of 64 lanes, eight waves each).
TARGETS = {
    "sm_80": Target("cuda", 80, 163 << 10, 164 << 10, 1024, 64, 32),
    "sm_86": Target("cuda", 86, 99 << 10, 100 << 10, 1024, 48, 16),
    "sm_89": Target("cuda", 89, 99 << 10, 100 << 10, 1024, 48, 24),
    "sm_90": Target("cuda", 90, 227 << 10, 228 << 10, 1024, 64, 32),
    "sm_100": Target("cuda", 100, 227 << 10, 228 << 10, 1024, 64, 32),
    "sm_120": Target("cuda", 120, 99 << 10, 100 << 10, 1024, 48, 24),
    "gfx942": Target("hip", "gfx942", 64 << 10, 64 << 10, 0, 32, 16, 64, 131072),
}
