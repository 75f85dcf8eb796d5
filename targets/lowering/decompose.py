"""Tmp."""


def decompose(proto):
    return proto
