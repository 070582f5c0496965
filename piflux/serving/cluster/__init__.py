"""The server on a cluster, by Ray Serve: `serve run piflux.serving.cluster:app`.

A replica is a leader, which runs an engine, and its ranks, each of them an actor. The front is a
deployment of its own before all replicas: where one of them is lost, it has another one draw what
that had taken.
"""

from piflux.serving.cluster.app import app as app
from piflux.serving.cluster.settings import Settings as Settings
