"""Images and videos."""

from occgen_hub.media.damage import MAX_PIXELS, MEND, RESTORE
from occgen_hub.media.pictures import (
    ImageSequence,
    PictureFacts,
    decode_depth,
    decode_rgb,
    encode_jpeg,
    fitted,
    image_size,
    is_jpeg,
    picture_facts,
    read_depth,
    read_picture,
    read_rgb,
    write_jpeg,
)
from occgen_hub.media.video import (
    SeekingVideo,
    VideoFacts,
    VideoReader,
    VideoSurvey,
    stated_pixels,
    survey_video,
    video_facts,
    video_frames,
)
from occgen_hub.media.writing import VideoWriter, write_video

__all__ = [
    "MAX_PIXELS",
    "MEND",
    "RESTORE",
    "ImageSequence",
    "PictureFacts",
    "SeekingVideo",
    "VideoFacts",
    "VideoReader",
    "VideoSurvey",
    "VideoWriter",
    "decode_depth",
    "decode_rgb",
    "encode_jpeg",
    "fitted",
    "image_size",
    "is_jpeg",
    "picture_facts",
    "read_depth",
    "read_picture",
    "read_rgb",
    "stated_pixels",
    "survey_video",
    "video_facts",
    "video_frames",
    "write_jpeg",
    "write_video",
]
