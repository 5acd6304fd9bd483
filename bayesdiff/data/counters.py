"""Random numbers that are functions of what they are for: no state, no order, any device.

A key is mixed from whole numbers such as a seed, an epoch and the place of an image; the numbers
of a key are the SplitMix64 stream (Steele, Lea & Flood 2014) that starts at it. Whoever asks for
the same gets the same, in batches of any size, after a resume and in any process.
"""

import torch
from torch import Tensor

# Odd and multiplicative constants of SplitMix64, as the signed numbers that torch has.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def keys_of(places: Tensor, *numbers: int) -> Tensor:
    """A key for every place.

    Args:
        places: int64 ``(n,)``, such as those of images in a data set.
        numbers: what else the random numbers are for, in this order; each below 2**63.

    Returns:
        int64 ``(n,)`` on the same device.
    """
    key = torch.zeros((), dtype=torch.int64)
    for number in numbers:
        key = _mixed(key + (number + _STEP))
    return _mixed(places + (key + _STEP))


def words(keys: Tensor, places: Tensor) -> Tensor:
    """Random numbers of keys, uniform from 0 to 2**32 - 1.

    Args:
        keys: int64.
        places: of the numbers in the stream of their key, int64 from 0; they broadcast.

    Returns:
        int64.
    """
    return _logical(_mixed(keys + _STEP * (places + 1)), 32)


def below(words: Tensor, bound: Tensor | int) -> Tensor:
    """Uniform whole numbers from 0 to below a bound of at most 2**31, from those of `words`."""
    return (words * bound) >> 32


def _mixed(state: Tensor) -> Tensor:
    """A bijection of 64 bits in which every bit of the result depends on all bits."""
    state = (state ^ _logical(state, 30)) * _FIRST
    state = (state ^ _logical(state, 27)) * _SECOND
    return state ^ _logical(state, 31)


def _logical(state: Tensor, by: int) -> Tensor:
    """Shifted to the right without sign."""
    return (state >> by) & ((1 << (64 - by)) - 1)
