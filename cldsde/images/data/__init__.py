"""Image data sets with labels, and their way to numbers in [−1, 1] and back.

Images are loaded by row, from memory or files, so that a data set may exceed memory.
"""

from cldsde.images.data.folder import FolderImages
from cldsde.images.data.images import ArrayImages, Images, array_images
from cldsde.images.data.pixels import augment, channel_statistics, to_levels, to_unit
from cldsde.images.data.sets import (
    DATA_SETS,
    DataSet,
    array_file,
    digits,
    fashion_mnist,
    image_folder,
    torchvision_set,
)

__all__ = [
    "DATA_SETS",
    "ArrayImages",
    "DataSet",
    "FolderImages",
    "Images",
    "array_file",
    "array_images",
    "augment",
    "channel_statistics",
    "digits",
    "fashion_mnist",
    "image_folder",
    "to_levels",
    "to_unit",
    "torchvision_set",
]
