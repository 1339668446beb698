# SPDX-License-Identifier: MIT
"""Follow a starting vLLM server until it is proven, dead, or out of time."""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

display = Display()

_LOG_LINES = 15
# How often to say that nothing has changed; seconds.
_REMINDER = 10


def verdict(state: dict[str, Any], first_restarts: int) -> str | None:
    """Return why no more waiting will help, or None while it may."""
    if state["problems"]:
        return " ".join(state["problems"])
    container = state["container"]
    if container is None:
        return "The container is gone."
    if container["restarts"] > first_restarts or container["status"] not in ("running", "created"):
        detail = f" ({container['error']})" if container["error"] else ""
        return f"The server died with exit code {container['exit_code']}{detail}."
    # On another card it will not move; a server that is ready and on no card
    # at all, or that serves another model, will not mend itself either.
    if state["referee"].get("code") == 1:
        return str(state["referee"]["message"])
    if state["api"]["healthy"] and state["api"]["error"]:
        return f"The server answers, but {state['api']['error']}."
    return None


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action behind mlops.vllm_gpu.wait_for_server."""

    _supports_check_mode = False

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Look until the server is proven (success) or can't become so (failure)."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        timeout, interval = int(arguments.pop("timeout", 1800)), int(arguments.pop("interval", 2))
        host = (task_vars or {}).get("inventory_hostname", "host")
        started = time.monotonic()
        said, said_at, restarts = "", 0.0, None
        while True:
            state = self._execute_module(
                module_name="mlops.vllm_gpu.server_info",
                module_args={**arguments, "log_lines": _LOG_LINES},
                task_vars=task_vars,
            )
            elapsed = time.monotonic() - started
            result.update(state, elapsed=round(elapsed))
            if state.get("failed") or state.get("unreachable") or state["proven"]:
                return result
            if restarts is None:
                restarts = state["container"]["restarts"] if state["container"] else 0
            reason = verdict(state, restarts)
            if reason is None and elapsed > timeout:
                reason = f"The server was not ready after {timeout} s: {state['doubts'][0]}"
            if reason:
                log = "".join(f"\n  {line}" for line in state["log"])
                tail = f"\nThe last lines of its log:{log}" if log else ""
                return {"failed": True, "msg": f"{host}: {reason}{tail}", "elapsed": round(elapsed)}
            now = state["doubts"][0]
            if now != said or elapsed - said_at > _REMINDER:
                last = f" | {state['log'][-1].strip()}" if state["log"] else ""
                display.display(f"{host}: {elapsed:.0f} s, waiting: {now}{last}"[:160])
                said, said_at = now, elapsed
            time.sleep(interval)
