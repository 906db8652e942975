"""`propulsion.train` with CPUs that accelerate treats as accelerators, the only devices it shards models over."""

from accelerate import PartialState
from accelerate.utils import DistributedType

from propulsion.errors import run_command
from propulsion.train import command

initialise = PartialState.__init__


def as_accelerators(self, *args, **options):
    initialise(self, *args, **options)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = as_accelerators
run_command(command)
