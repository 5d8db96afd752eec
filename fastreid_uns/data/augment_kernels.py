"""Loops over the pixels of a batch, compiled by numba; imported only when first used on a CPU."""

from __future__ import annotations

import numpy as np

from fastreid_uns.utils.compiled import compiled


@compiled
def flip_shift_scale(start, stop, images, flip, offset, out):
    """`out[i]` = the window of the image, mirrored if `flip[i]`, that begins at `offset[i]`, over 255; black outside.

    One pass over the rows: on a CPU the time goes into reaching memory.
    """
    channels, height, width = images.shape[1:]
    scale = np.float32(255)
    for i in range(start, stop):
        down, right = offset[i, 0], offset[i, 1]
        first, last = min(max(-right, 0), width), max(min(width - right, width), 0)
        count = last - first
        for channel in range(channels):
            for y in range(height):
                row = out[i, channel, y]
                if y + down < 0 or y + down >= height or count <= 0:
                    row[:] = 0
                    continue
                row[:first] = 0
                row[last:] = 0
                target = row[first:last]
                if flip[i]:
                    source = images[i, channel, y + down, width - last - right : width - first - right][::-1]
                    for x in range(count):
                        target[x] = np.float32(source[x]) / scale
                else:
                    source = images[i, channel, y + down, first + right : last + right]
                    for x in range(count):
                        target[x] = np.float32(source[x]) / scale


@compiled
def fill_boxes(start, stop, images, boxes, fill):
    """Fill box i (top, left, height, width) of each image with one value for each channel, in place."""
    for i in range(start, stop):
        top, left, height, width = boxes[i]
        for channel in range(images.shape[1]):
            images[i, channel, top : top + height, left : left + width] = fill[channel]
