"""Whatever a camera's images are stored as becomes uint8 [H, W, 3] RGB here: turned as EXIF says, gray in three equal
channels, the first frame of an animation, other ranges scaled to 8 bits, alpha left out (the stored colors are kept, as
FFmpeg and Pillow do). One channel of more than 8 bits, or of floats, is a depth map and no camera."""

from .arrays import ArrayForm, channels_of
from .cameras import choose_cameras
from .encoded import DAMAGE, Stored, check_size, decode, decode_all, is_turned, open_image, renamed, survey

__all__ = [
    "DAMAGE",
    "ArrayForm",
    "Stored",
    "channels_of",
    "check_size",
    "choose_cameras",
    "decode",
    "decode_all",
    "is_turned",
    "open_image",
    "renamed",
    "survey",
]
