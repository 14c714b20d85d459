"""The sizes of a network, which can be read without importing torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

HEAD_VIEWS = 8
"""Number of views whose heads run at a time. Their maps need more memory than the trunk."""

Width = Annotated[int, Field(ge=8, le=1 << 14)]
Count = Annotated[int, Field(ge=1, le=1 << 10)]


class Sizes(BaseModel):
    """The sizes of a network. Those of the published ones are in ckpt/<name>/config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    patch: Count = 14
    width: Width = 1024
    heads: Count = 16
    encoder_depth: Count = 24
    encoder_registers: Count = 4
    position_grid: Count = 37
    decoder_depth: Annotated[int, Field(ge=2, le=1 << 10)] = 36
    registers: Count = 5
    head_depth: Count = 5
    camera_width: Width = 512
    upsampling: Annotated[tuple[Width, ...], Field(min_length=1, max_length=4)] = (256, 128, 64)
    metric_width: Width = 512
    metric_heads: Count = 8
    pose_blocks: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)] = (
        1,
        9,
        17,
        25,
        33,
    )

    @model_validator(mode="after")
    def _check_fit(self) -> Sizes:
        """Check divisibility: heads have equal widths, and positions use eighths of a head."""
        if self.width % (8 * self.heads):
            raise ValueError("width must be a multiple of 8 * heads")
        if self.metric_width % (4 * self.metric_heads):
            raise ValueError("metric_width must be a multiple of 4 * metric_heads")
        if any(channels > 16 and channels % 16 for channels in self.upsampling):
            raise ValueError("values of upsampling above 16 must be multiples of 16")
        if list(self.pose_blocks) != sorted(set(self.pose_blocks)) or min(self.pose_blocks) < 0:
            raise ValueError("pose_blocks must be ascending numbers of the decoder's blocks")
        return self
