"""Runs in vLLM's environment: loads a folder in vLLM, dumps what was loaded, and computes logprobs of one prompt.

Started once by matrix.py, for importing vLLM takes longer than loading a small model: reads one job per line from stdin as JSON,
runs it in a forked process, and answers each with a line. What vLLM prints goes to `job["out"]/log`.

{"folder": "wint4", "out": "wint4-tp2", "tp": 2, "ep": false, "speculate": false, "vocabulary": 1024}
With the job as its argument it runs that one as users start vLLM: its own arithmetic, compiled, workers spawned, no dump.
-> {"error": "", "seconds": 8.1}; out/logprobs.safetensors, out/target-0.safetensors, out/target-1.safetensors
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

PROMPT = (1, 5, 9, 77, 300, 12, 640, 33, 8, 500, 111, 222)
NEW_TOKENS = 4
SECONDS = 300  # for one job, on a busy machine
REPLACED = {
    "PLAIN_ARITHMETIC": "1",
    "VLLM_PLUGINS": "plain_arithmetic,ernie_quant",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its workers can be asked
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles a helper of its logprobs, for seconds in every process
}
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def run(job: dict[str, Any]) -> None:
    """Load, dump, compute."""
    import torch
    from plain_arithmetic import dump
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    if job["tp"] > 1:
        extra |= {"tensor_parallel_size": job["tp"], "distributed_executor_backend": "mp"}
    if job["ep"]:
        extra["enable_expert_parallel"] = True
    if job["speculate"]:
        extra["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    if "vision_config" in json.loads(Path(job["folder"], "config.json").read_text()):
        extra["limit_mm_per_prompt"] = {"image": 0, "video": 0}
    everything = job["vocabulary"]
    llm = LLM(
        job["folder"],
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=not job["stock"],
        max_model_len=128,
        max_num_seqs=2,
        max_logprobs=everything,
        kv_cache_memory_bytes=1 << 26,
        **extra,
    )
    if not job["stock"]:
        llm.collective_rpc(dump.parameters, args=(job["out"],))
    wanted = SamplingParams(
        max_tokens=NEW_TOKENS,
        temperature=0,
        logprobs=everything,
        prompt_logprobs=everything,
        detokenize=False,
        ignore_eos=True,
    )
    answer = llm.generate([{"prompt_token_ids": list(PROMPT)}], wanted)[0]
    rows = [*answer.prompt_logprobs[1:], *answer.outputs[0].logprobs]
    logprobs = torch.tensor([[row[token].logprob for token in range(everything)] for row in rows])
    save_file({"logprobs": logprobs}, Path(job["out"], "logprobs.safetensors"))


def forked(job: dict[str, Any]) -> dict[str, Any]:
    """Run it in a process of its own; the answer."""
    started = time.monotonic()
    out = Path(job["out"])
    out.mkdir(parents=True)
    child = os.fork()
    if child == 0:
        os.setsid()  # with its workers, to be stopped together
        log = os.open(out / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 1
        try:
            run(job)
            code = 0
        except BaseException as error:
            traceback.print_exc()
            (out / "error").write_text(f"{type(error).__name__}: {error}")
        finally:
            sys.stdout.flush()
            os._exit(code)
    status = ended(child, started + SECONDS)
    tidy((out / "log").read_text(errors="replace"))
    return {"error": cause(out, status) if status else "", "seconds": round(time.monotonic() - started, 1)}


def ended(child: int, deadline: float) -> int:
    """Its status, when it has ended or was stopped."""
    found, status = os.waitpid(child, os.WNOHANG)
    while not found and time.monotonic() < deadline:
        time.sleep(0.05)
        found, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # workers that outlive a failed start too
    return status if found else os.waitpid(child, 0)[1]


def tidy(log: str) -> None:
    """Remove what vLLM leaves of its processes' rendezvous, in memory and on disk; the log names it."""
    for name in set(re.findall(r"vllm_dist_[0-9a-f]{32}", log)):
        for folder in ("/dev/shm", tempfile.gettempdir()):
            for path in Path(folder).glob(f"{name}*"):
                path.unlink()


def cause(out: Path, status: int) -> str:
    """Why it failed; of a worker, which tells its parent no more than that it did, from the log."""
    error = (out / "error").read_text() if (out / "error").exists() else f"ended with status {status}"
    if "background process" not in error:
        return error
    raised = re.findall(r"\b(\w+(?:Error|Exception): .*)", (out / "log").read_text(errors="replace"))
    return next((text for text in raised if text not in error), error)


def import_once() -> None:
    """All that jobs need, before they are forked; and let vLLM fork the workers of TP 2 too, which it would start anew."""
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from plain_arithmetic import register
    from vllm.v1.executor import multiproc_executor

    register()
    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")
    gc.freeze()  # vLLM collects garbage often, and need not look at all these modules


def main() -> None:
    """Answer jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints while it is imported
    os.environ.update(ENVIRONMENT)
    if sys.argv[1:]:
        run(json.loads(sys.argv[1]))
        return
    os.environ.update(REPLACED)
    import_once()
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
