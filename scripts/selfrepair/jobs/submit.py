"""The entry point of stage scripts: have a job done by a warm worker or in this process, and report failures."""

import sys

from selfrepair.errors import InputError, StageError
from selfrepair.jobs import logs
from selfrepair.jobs.devices import Device, leased
from selfrepair.jobs.job import Job


def submit(job: Job) -> None:
    """Do `job` and write its log. On failure write the reason to the log and end the process with status 1.

    An InputError is logged as its message, any other error as its traceback.
    """
    logs.clear(job.log)
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
        import traceback

        logs.append(job.log, traceback.format_exc())
        sys.exit(1)


def run(job: Job) -> None:
    """Do `job` in a worker if `runtime.worker` is on and the stage uses a model, else in this process.

    Raises the errors of the stage: InputError as it is, any other error of a worker as StageError.
    """
    from selfrepair.planning.stages import MODEL_STAGES

    if job.stage not in MODEL_STAGES:
        _run_here(job, None)
        return
    from selfrepair.jobs.worker import address, client

    with leased(job, address.private_directory()) as lease:
        if job.runtime.get("worker"):
            client.request(job, lease)
        else:
            _run_here(job, lease.device)


def _run_here(job: Job, device: Device | None) -> None:
    import os

    from selfrepair.jobs.dispatch import run_stage
    from selfrepair.jobs.lifeline import end_with_run
    from selfrepair.jobs.threads import use_every_cpu
    from selfrepair.planning.fingerprint import stage_digest

    if job.params.get("code", "") not in ("", stage_digest(job.stage)):
        raise changed_code()
    use_every_cpu()
    end_with_run()
    with logs.redirected(job.log):
        session = None
        if device is not None:
            device.apply(os.environ)
            from selfrepair.jobs.session import Session  # imports torch, which reads CUDA_VISIBLE_DEVICES

            session = Session(device.name, device.number)
        run_stage(job, session)


def changed_code() -> InputError:
    """Return the error for a job whose code changed after it was planned: its results would be filed wrongly."""
    return InputError(
        "the package's modules were changed while this run was under way",
        remedy="run the same command again: it starts with the modules as they are now.",
    )
