"""May another machine compute stages of this run?

A worker must have the same sources and libraries, the same engine on the same kind of device, and see the same store;
otherwise its results would differ from those of the run's own machine, or be missed there. Nothing is started here,
and no worker is asked: this is what runs on it.
"""

from dataclasses import dataclass

from ptq.engines import open_engine
from ptq.errors import PtqError
from ptq.provenance import library_versions, package_digest
from ptq.records.base import ArtifactRef
from ptq.records.graph import EngineIdentity
from ptq.storage.store import open_store
from ptq.wording import engine_text


@dataclass(frozen=True, slots=True)
class WorkerRequirements:
    """What the machine of a run is and sees; `libraries` are pairs of distribution and version.

    `threads` is the number asked for, 0 for all cores; `probe` is an object that the run has put into its store.
    """

    sources: str
    libraries: tuple[tuple[str, str], ...]
    engine: EngineIdentity
    threads: int
    store_uri: str
    probe: ArtifactRef


def worker_requirements(engine: EngineIdentity, *, threads: int, store_uri: str) -> WorkerRequirements:
    """Returns the terms of a run on this machine, its store named by an absolute URI, with a probe in that store.

    Raises:
        PtqError: the store cannot be written.
    """
    store = open_store(store_uri)
    sources = package_digest()
    return WorkerRequirements(
        sources=sources,
        libraries=tuple(sorted(library_versions().items())),
        engine=engine,
        threads=threads,
        store_uri=store.uri,
        probe=store.put_bytes(f"sources {sources}\n".encode(), "probe.txt"),
    )


def worker_mismatch(terms: WorkerRequirements) -> str:
    """Returns what keeps this machine from computing stages of that run, in one or two sentences; empty if nothing."""
    if package_digest() != terms.sources:
        return (
            f"has the sources {package_digest()[:12]} of ptq, tasks and flows, the flow {terms.sources[:12]}. Install "
            "the same commit on both and start the worker again."
        )
    versions = library_versions()
    for name, version in terms.libraries:
        if versions[name] != version:
            return (
                f"has {name} {versions[name] or 'not installed'}, the flow {version or 'none'}. Install the same "
                "constraints.txt on both and start the worker again."
            )
    try:
        found = open_engine(terms.engine.name, threads=terms.threads).identity()
        is_seen = open_store(terms.store_uri).has(terms.probe)
    except PtqError as error:
        return f"cannot compute stages: {error}"
    if found != terms.engine:
        return (
            f"runs {_described(found)}, the flow {_described(terms.engine)}; results have the same bits only on the "
            "same. Take workers of one kind and run the flow on such a machine, and set engine.threads to the threads "
            "that each worker may use."
        )
    if not is_seen:
        return (
            f"does not see what the flow wrote to the store {terms.store_uri}. Set output.store to a bucket, or to a "
            "folder that every machine has mounted at the same path."
        )
    return ""


def _described(engine: EngineIdentity) -> str:
    described = engine_text(engine.name, engine.version, engine.device, engine.isa)
    return f"{described} with {engine.threads} threads"
