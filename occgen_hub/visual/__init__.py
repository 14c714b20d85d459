"""Pictures, videos and reports of built datasets."""

SEQUENCES = (
    "merge_npy_sequence_cam",
    "merge_npy_sequence_world",
    "merge_ply_sequence_cam",
    "merge_ply_sequence_world",
    "occ_only_cam_npy",
    "occ_only_cam_ply",
)
"""The folders that `sequences.write_sequences` can write, each with one file per frame."""
