"""The former name of :mod:`ntk.infinite.networks`."""

from ntk.infinite.networks import *  # noqa: F403
