"""What a stage script calls: have the job done, by a warm worker or right here, and report how it went."""

import sys
import traceback

from selfrepair.errors import InputError, StageError
from selfrepair.jobs import logs
from selfrepair.jobs.job import Job


def submit(job: Job) -> None:
    """Do `job` and write its log; on failure end the process with status 1, the reason in the log.

    An InputError is told in its own words; any other error with its traceback.
    """
    logs.begin(job.log)
    try:
        run(job)
    except KeyboardInterrupt:
        sys.exit(130)
    except InputError as error:
        logs.append(job.log, f"Error: {error}")
        sys.exit(1)
    except StageError as error:
        logs.append(job.log, str(error))
        sys.exit(1)
    except Exception:
        logs.append(job.log, traceback.format_exc())
        sys.exit(1)


def run(job: Job) -> None:
    """Do `job` in a worker where `runtime.worker` says so, else in this process; raise what it raises."""
    from selfrepair.planning.stages import MODEL_STAGES

    if job.stage in MODEL_STAGES and job.runtime.get("worker"):
        from selfrepair.jobs.worker import client

        client.request(job)
    else:
        _run_here(job)


def _run_here(job: Job) -> None:
    from selfrepair.jobs.dispatch import run_stage
    from selfrepair.jobs.lifeline import end_with_run
    from selfrepair.jobs.threads import use_every_cpu
    from selfrepair.planning.fingerprint import code_digest
    from selfrepair.planning.stages import MODEL_STAGES, stage_module

    if job.params.get("code", "") not in ("", code_digest([stage_module(job.stage)])):
        raise changed_code()
    use_every_cpu()
    end_with_run()
    with logs.into(job.log):
        session = None
        if job.stage in MODEL_STAGES:
            from selfrepair.jobs.session import Session

            session = Session(job.runtime["device"])
        run_stage(job, session)


def changed_code() -> InputError:
    """The error for results that would not be those of the code they are filed under."""
    return InputError(
        "the package's modules were changed while this run was under way",
        remedy="run the same command again: it starts with the modules as they are now.",
    )
