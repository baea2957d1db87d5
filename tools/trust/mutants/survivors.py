"""Why the survivors of the recorded sample are not noticed, by the numbers of their mutants."""

from __future__ import annotations

OF_A_MATRIX = "of a matrix, the last dimension is the second"
SLOWER = "only slower, or of more memory"
BY_NAME = "an option could be given by position, too"
OF_A_CLASS = "it is called by its class, which gives the plain function"
OF_A_VECTOR = "of a vector, the last dimension is the first"
EQUALLY_LONG = "both are equally long by construction"
ON_CUDA = "only off the CPU"
IN_ONNX = "only in ONNX, whose tests are slow ones"
ABSTRACT = "the type checker finds a subclass that lacks a method"
UNWRITTEN = "nobody writes to it"
A_SIZE = "a size that is a matter of taste"
A_TRIAL = "which numbers a trial takes"
A_HINT = "which of two similar names a hint takes"
EQUIVALENT: dict[int, str] = {
    43: OF_A_MATRIX,
    64: "a layer has one expert at least",
    125: "it is replaced before it is read",
    152: OF_A_MATRIX,
    195: "of equal numbers, the last is the first",
    373: "no conv looks at its own node alone",
    431: "a shared expert is a stack of one",
    668: "of a legal pair, both are strings or none is",
    670: "any negative number stands for a removed expert",
    863: "a number of groups is not negative",
    882: "graphs are compared by identity",
    895: "a layout is one object",
    902: "neither no heads nor one divide a width",
    912: "what is above zero is not minus infinity",
    977: "a gated MLP has one layer up at least",
    989: "of no rows, the first is none",
    991: "the convs of a stack have the same options",
}
"""Mutants, by their number, that compute the same under every legal value; and why.

They are excused.
"""

UNSEEN: dict[int, str] = {
    13: SLOWER,
    16: OF_A_CLASS,
    24: "the layers of an MLP have one type",
    51: SLOWER,
    54: SLOWER,
    97: OF_A_CLASS,
    105: EQUALLY_LONG,
    106: A_SIZE,
    111: OF_A_VECTOR,
    112: SLOWER,
    131: SLOWER,
    147: OF_A_CLASS,
    156: "no module is in a stack twice",
    158: EQUALLY_LONG,
    160: OF_A_VECTOR,
    172: OF_A_CLASS,
    185: SLOWER,
    193: SLOWER,
    202: ABSTRACT,
    204: BY_NAME,
    230: A_SIZE,
    258: OF_A_VECTOR,
    277: SLOWER,
    305: BY_NAME,
    309: UNWRITTEN,
    316: "no argument of PyG's convs is given by position alone",
    362: A_HINT,
    380: ON_CUDA,
    392: EQUALLY_LONG,
    394: "only of graphs of two billion nodes",
    399: A_SIZE,
    423: SLOWER,
    426: SLOWER,
    501: A_SIZE,
    507: "nobody compares matrices",
    520: OF_A_VECTOR,
    539: IN_ONNX,
    557: A_SIZE,
    561: SLOWER,
    564: OF_A_VECTOR,
    577: "what is copied too much is overwritten",
    591: "a sum of columns apart is the same sum",
    611: BY_NAME,
    631: OF_A_CLASS,
    636: A_TRIAL,
    655: "parts of an MLP are called with one argument",
    661: EQUALLY_LONG,
    676: UNWRITTEN,
    681: OF_A_VECTOR,
    682: "Python keeps one object of each small number",
    698: A_TRIAL,
    708: EQUALLY_LONG,
    717: IN_ONNX,
    736: A_HINT,
    743: BY_NAME,
    766: SLOWER,
    770: SLOWER,
    771: SLOWER,
    794: OF_A_CLASS,
    813: EQUALLY_LONG,
    814: OF_A_VECTOR,
    822: BY_NAME,
    834: IN_ONNX,
    844: BY_NAME,
    855: SLOWER,
    862: A_TRIAL,
    875: ON_CUDA,
    883: ABSTRACT,
    886: "no part of a router has such buffers",
    904: ABSTRACT,
    916: SLOWER,
    917: SLOWER,
    924: EQUALLY_LONG,
    936: A_TRIAL,
    943: OF_A_VECTOR,
    975: A_TRIAL,
    987: SLOWER,
    998: OF_A_CLASS,
}
"""Why no test sees the other survivors, which count."""
