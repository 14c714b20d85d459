"""How large a network is: numbers alone, so that they are read without loading torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

HEAD_VIEWS = 8
"""Views whose heads are worked out at a time: their maps are larger than all of the trunk's."""

Width = Annotated[int, Field(ge=8, le=1 << 14)]
Count = Annotated[int, Field(ge=1, le=1 << 10)]


class Sizes(BaseModel):
    """How large a network is; the published ones are in ckpt/<name>/config.json."""

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
    upsampling: tuple[Width, ...] = (256, 128, 64)
    metric_width: Width = 512
    metric_heads: Count = 8
    pose_blocks: tuple[int, ...] = (1, 9, 17, 25, 33)
