# SPDX-License-Identifier: MIT
"""Wait until a starting vLLM server is proven, has died, or takes too long."""

from __future__ import annotations

import time
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.advice import with_advice

display = Display()

_LOG_LINES = 10
# How often to report that nothing has changed; seconds.
_REMINDER = 10
# How long a ready server may be on no card; seconds.
_ON_NO_CARD = 20
# How long the connection or the Docker Engine may be lost, for example during a restart; seconds.
_AWAY = 60


def allowed_restarts(before: dict[str, Any]) -> int:
    """Return how many restarts the container may have: those before the wait, and one where it worked before.

    It may have been found dying. One that never worked is in a crash loop.
    """
    restarts: int = before["restarts"]
    return restarts + 1 if before["was_ready"] else restarts


def verdict(state: dict[str, Any], restarts: int) -> str | None:
    """Return why waiting longer is pointless, or None."""
    container = state["container"]
    if container is None:
        return "The container is gone."
    if container["oom_killed"]:
        return "The host ran out of memory, and its kernel killed the server."
    brought_back = container["status"] == "restarting" and container["restarts"] <= restarts
    if container["status"] not in ("running", "created") and not brought_back:
        detail = f" ({container['error']})" if container["error"] else ""
        return f"The server died with exit code {container['exit_code']}{detail}."
    if container["restarts"] > restarts:
        # Docker no longer knows the exit code.
        return (
            f"The server died, and its restart policy has started it again ({container['restarts']} times)."
        )
    return misplaced(state)


def misplaced(state: dict[str, Any]) -> str | None:
    """Return what is wrong with a running server for good, or None."""
    if state["referee"]["code"] == 1:
        return "{message} {cure}".format(**state["referee"])
    if state["referee"]["code"] == 0 and state["api"]["healthy"] and state["api"]["error"]:
        return f"The server answers, but {state['api']['error']}."
    return None


class ActionModule(ActionBase):  # type: ignore[misc]
    """The action of mlops.vllm_gpu.wait_for_server."""

    _supports_check_mode = False

    def _read(self, arguments: dict[str, Any], task_vars: Any, interval: int) -> dict[str, Any]:
        """Read the host; retry while the connection or its Docker Engine is lost."""
        away_since = None
        while True:
            lost, state = None, {}
            try:
                state = self._execute_module(
                    module_name="mlops.vllm_gpu.server_info",
                    module_args={**arguments, "waiting": True, "log_lines": _LOG_LINES},
                    task_vars=task_vars,
                )
            except AnsibleConnectionFailure as error:
                lost = error
            if not (lost or state.get("unanswered")):
                return state
            if away_since is None:
                away_since = time.monotonic()
                what = "the connection" if lost else "the Docker Engine"
                name = task_vars.get("inventory_hostname", "host")
                display.display(f"{name}: waiting: {what} gives no answer; trying again for {_AWAY} s")
            if time.monotonic() - away_since > _AWAY:
                if lost:
                    raise lost
                return state
            time.sleep(interval)

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Read the host until the server is proven (success) or can't be (failure)."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = dict(self._task.args)
        timeout, interval = int(arguments.pop("timeout", 1800)), int(arguments.pop("interval", 2))
        host = (task_vars or {}).get("inventory_hostname", "host")
        started = time.monotonic()
        before = arguments.pop("before", None) or {}
        shown, shown_at, ready_at = "", 0.0, 0.0
        problems: list[str] = []
        while True:
            state = self._read(arguments, task_vars, interval)
            elapsed = time.monotonic() - started
            result.update(state, elapsed=round(elapsed))
            if state.get("failed") or state["proven"]:
                return result
            # A busy Docker Engine or driver can fail one read: only a repeated problem counts.
            if state["problems"] and not problems:
                problems = state["problems"]
                time.sleep(interval)
                continue
            problems = state["problems"]
            same = state["container"] and state["container"]["id"] == before.get("id")
            reason = " ".join(problems) or verdict(state, allowed_restarts(before) if same else 0)
            if not state["api"]["healthy"]:
                ready_at = elapsed
            elif reason is None and elapsed - ready_at > _ON_NO_CARD:
                reason = "The API is ready, but {message} {cure}".format(**state["referee"])
            if reason is None and elapsed > timeout:
                reason = f"The server was not ready after {timeout} s: {state['doubts'][0]}"
            if reason:
                log = "".join(f"\n  {line}" for line in state["log"])
                tail = f"\nThe last lines of its log:{log}" if log else ""
                # Without the whole state, which would bury the message.
                unproven = {"proven": False, "recorded": False, "elapsed": round(elapsed)}
                return {**unproven, "failed": True, "msg": with_advice(f"{host}: {reason}{tail}")}
            now = state["doubts"][0]
            if now != shown or elapsed - shown_at > _REMINDER:
                # While it loads, its log shows more than "no answer".
                shown_text = state["log"][-1].strip() if state["log"] and not state["api"]["healthy"] else now
                line = f"{host}: waiting: {elapsed:.0f} of up to {timeout} s: {shown_text}"
                # Ansible's width is 79 where there is no terminal.
                width = display.columns if display.columns > 79 else 160
                display.display(line if len(line) <= width else f"{line[: width - 1]}…")
                shown, shown_at = now, elapsed
            time.sleep(interval)
