"""From settings to a finished part in a run: builds the agent's parts and drives its loop."""

from __future__ import annotations

import contextlib
import functools
import logging
import platform

from edge_agent import link_probe, records
from edge_agent.agent import Agent
from edge_agent.backends import open_backend
from edge_agent.backends.base import Backend
from edge_agent.conversation import Conversation, Pulse, new_instance, status_will
from edge_agent.downloads import Downloads
from edge_agent.emulation import EmulatedLink, emulated, link_of, over_link
from edge_agent.model_cache import ModelCache
from edge_agent.participation import Parts
from edge_agent.profile_cache import FOLDER, ProfileCache
from edge_agent.profiler import Machine, Profiler, tolerant
from edge_agent.sensors import Sensors, open_sensors
from edge_agent.settings import AgentSettings
from edge_agent.telemetry import PacedTelemetry
from shared import health, logs, version
from shared.clock import Clock
from shared.errors import HsplitError
from shared.protocol.messages import DeviceProfile, Finished
from shared.protocol.topics import agent_filters
from shared.transport.link import MessageLink
from shared.transport.mqtt import MqttTransport

logger = logging.getLogger(__name__)

IDLE_WAIT_S = 0.5
FAILED_RUN = 1


def run(settings: AgentSettings, clock: Clock) -> int:
    """Take part in a run until it ends; return the exit code.

    Raises:
        HsplitError: the data is unusable, the broker or the coordinator refuses, and so on.
    """
    logs.bind(device_id=settings.device_id)
    if settings.emulation is not None:
        logger.info("playing a smaller device: %s", settings.emulation)
    # First the text: whoever has to correct a line need not wait for torch or a broker.
    text = records.load(
        settings.data,
        evaluation_data=settings.evaluation_data,
        evaluation_fraction=settings.evaluation_fraction,
    )
    sensors = open_sensors(gpu=settings.gpu)
    device = None if settings.device == "auto" else settings.device
    own = open_backend(settings.backend, device=device, threads=settings.threads)
    backend = emulated(own, settings.emulation)
    profile = DeviceProfile(
        backend=backend.name,
        hsplit_version=version.VERSION,
        machine=f"{platform.machine()} {platform.system()}",
        accelerator=backend.accelerator,
        memory_limit_bytes=settings.least_memory,
        sequences=len(text.training),
        evaluation_sequences=0 if text.held_out is None else len(text.held_out),
        facts=sensors.facts(),
        computes_with=backend.computes_with,
    )
    logger.info("computing with %s (%s)", backend.computes_with, backend.accelerator or "no GPU")
    with contextlib.ExitStack() as stack:
        stack.callback(sensors.close)
        health_file = health.HealthFile(settings.health_file, clock)
        stack.callback(health_file.close)
        cache = ModelCache(settings.cache_folder)
        stack.callback(cache.close)
        instance = new_instance()
        emulated_link = link_of(settings.emulation)
        link = _connected(settings, instance, clock, emulated_link=emulated_link, stack=stack)
        read = functools.partial(sensors.read, on_gpu=backend.accelerator is not None)
        telemetry = PacedTelemetry(read, clock).due
        conversation = Conversation(settings.device_id, instance, link, clock, telemetry=telemetry)
        pulse = Pulse(conversation, link)
        pulse.start()
        stack.callback(pulse.stop)
        parts = Parts(
            backend=backend,
            downloads=Downloads(cache, cache_limit=settings.cache_limit),
            records=text.training,
            held_out_records=text.held_out,
            clock=clock,
            profiler=_profiler(settings, backend, sensors, clock, emulated_link),
            share_labels=settings.share_labels,
        )
        agent = Agent(conversation, profile, parts)
        finished = _drive(agent, conversation, health_file)
    logger.log(logging.ERROR if finished.failed else logging.INFO, "%s", finished.reason)
    return FAILED_RUN if finished.failed else 0


def _profiler(
    settings: AgentSettings,
    backend: Backend,
    sensors: Sensors,
    clock: Clock,
    emulated_link: EmulatedLink | None,
) -> Profiler:
    measure_link = link_probe.measurer(
        settings.broker, settings.device_id, clock=clock, emulated=emulated_link
    )
    return Profiler(
        Machine.of(settings, backend),
        sensors,
        ProfileCache(settings.state / FOLDER),
        measure_link=tolerant(measure_link),
    )


def _connected(
    settings: AgentSettings,
    instance: str,
    clock: Clock,
    *,
    emulated_link: EmulatedLink | None,
    stack: contextlib.ExitStack,
) -> MessageLink:
    transport = MqttTransport(
        settings.broker,
        client_name=f"hsplit-{settings.device_id}",
        will=status_will(settings.device_id, instance),
    )
    link = MessageLink(over_link(transport, emulated_link), clock)
    link.admit(settings.device_id)
    stack.callback(link.close)
    link.start(agent_filters(settings.device_id), timeout_s=settings.broker.connect_timeout_s)
    return link


def _drive(agent: Agent, conversation: Conversation, health_file: health.HealthFile) -> Finished:
    reason = "stopped"
    try:
        while agent.outcome is None:
            agent.turn(IDLE_WAIT_S)
            health_file.progress(agent.phase)
        reason = agent.outcome.reason
        return agent.outcome
    except HsplitError as error:
        reason = str(error)[:1000]
        raise
    finally:
        conversation.leave(reason)
