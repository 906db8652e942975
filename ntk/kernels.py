"""The former name of :mod:`ntk.layout`."""

from ntk.layout import *  # noqa: F403
