"""The entry point of a worker: a TaskContext in, an Outcome out, whatever happens.

Dispatches on the kind of task and turns every exception into a Fault; nothing escapes but the end of the process.
Importing this file imports all that training needs and runs nothing, so that a warm parent can fork workers that start
at once.
"""

from __future__ import annotations

import torch._dynamo  # noqa: F401  the first optimizer imports it, 1 to 2 s: here the warm parent has it

from protos.states import AttemptState
from protos.work import Outcome, TaskKind
from strategies.calibrate_torch import calibrate
from strategies.context import TaskContext
from strategies.data.source import MODEL_ALONE
from strategies.faults_torch import fault_of
from strategies.profile_model_torch import describe_model
from strategies.profile_torch import identify
from strategies.train_loop_torch import train


def run(context: TaskContext) -> Outcome:
    try:
        return _dispatch(context)
    except (Exception, SystemExit) as error:  # SystemExit: the user's code called sys.exit()
        return Outcome(AttemptState.FAILED, fault=fault_of(error, context.workspace.code_dir))


def _dispatch(context: TaskContext) -> Outcome:
    match context.task.kind:
        case TaskKind.TRAIN:
            return train(context)
        case TaskKind.IDENTIFY:
            return identify(context, describe_model if context.task.spec.data.source == MODEL_ALONE else None)
        case TaskKind.CALIBRATE:
            return calibrate(context)
