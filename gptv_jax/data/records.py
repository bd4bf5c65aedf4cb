"""Records: what a source yields for an example, and what transforms change.

A record is a dict of NumPy arrays. Which keys it has says what is known of the example:

    encoded         bytes of an image file that is not decoded yet
    image           uint8 [H, W, C], pixels
    tokens          uint16 [rows, columns], tokens of a cache
    label           int32, the class of the image
    boxes           float32 [n, 4]: y0, x0, y1, x1 in pixels of the image
    box_labels      int32 [n], classes of the boxes
    crowd           bool [n], whether a box is around a group of objects
    area            float32 [n], pixels of the object in the original image
    masks           bool [n, H, W], pixels of each object
    segmentation    uint8 or int32 [H, W], class of every pixel
    view            float32 [4]: y0, x0, y1, x1 of the part of the original image that the image
                    shows, in pixels of the original; y1 < y0 or x1 < x0 where it is mirrored
    damaged         int32, see data/damage.py

Geometry moves everything that lies in the image; colour changes pixels alone.
"""

import numpy as np

Record = dict[str, np.ndarray | np.generic | bytes]
PIXELS = ("encoded", "image", "tokens")  # the picture itself; other keys say something about it
OBJECTS = ("boxes", "box_labels", "crowd", "area", "masks")  # arrays with one entry an object


def annotations(record: Record) -> Record:
    """The record without the picture."""
    return {key: value for key, value in record.items() if key not in PIXELS}
