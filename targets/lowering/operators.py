"""Tmp."""


def unsupported(proto):
    return []


def single_node_models(proto):
    return []
