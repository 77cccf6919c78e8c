"""The ClientApp: Flower's messages in, a site's replies out."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.handlers import Site
from client.site import SiteConfig, load_site
from common.anchor_messages import AnchorReply
from common.errors import CohortiumError, SiteError
from common.evaluation_messages import EvaluateReply
from common.messages import JoinReply, ReleaseReply, Status, TrainReply

app = ClientApp()
SIMULATION_VARIABLE = "COHORTIUM_SIMULATION"


@app.query("join")
def join(message: Message, context: Context) -> Message:
    """Accept or refuse a study."""
    site = open_site(context)
    reply = site.join(message.content) if site else JoinReply(Status.SITE_MISCONFIGURED, "")
    return Message(content=reply.to_record(), reply_to=message)


@app.query("anchor")
def anchor(message: Message, context: Context) -> Message:
    """Reply with noised statistics of the site's patients."""
    site = open_site(context)
    reply = site.anchor(message.content) if site else AnchorReply(Status.SITE_MISCONFIGURED, "", "")
    return Message(content=reply.to_record(), reply_to=message)


@app.train("round")
def train(message: Message, context: Context) -> Message:
    """Train one round and reply with the projected update."""
    site = open_site(context)
    reply = site.train(message.content) if site else TrainReply(Status.SITE_MISCONFIGURED, "", "", 0)
    return Message(content=reply.to_record(), reply_to=message)


@app.query("release")
def release(message: Message, context: Context) -> Message:
    """Reply with synthetic rows of the site's own channel."""
    site = open_site(context)
    reply = site.release(message.content) if site else ReleaseReply(Status.SITE_MISCONFIGURED, "", "")
    return Message(content=reply.to_record(), reply_to=message)


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Reply with aggregates of the site's patients beside the cohort."""
    site = open_site(context)
    reply = site.evaluate(message.content) if site else EvaluateReply(Status.SITE_MISCONFIGURED, "", "")
    return Message(content=reply.to_record(), reply_to=message)


def open_site(context: Context) -> Site | None:
    """The site this node belongs to, or None, with the reason on the site's own standard error."""
    # An exception that reached Flower would be sent to the coordinator with its text.
    try:
        config = site_config(context)
    except Exception as error:
        reason = error if isinstance(error, CohortiumError) else type(error).__name__
        print(f"cohortium-site: {reason}", file=sys.stderr)
        return None
    if config.site.threads is not None:
        torch.set_num_threads(config.site.threads)
    return Site(config)


def site_config(context: Context) -> SiteConfig:
    """This node's site.toml: named by the hospital in the node's own configuration (`site-config="/path/site.toml"`).

    In a simulation the coordinator plays every hospital: COHORTIUM_SIMULATION names a JSON list of site.toml paths, one
    a virtual node.
    """
    path = context.node_config.get("site-config")
    listing = os.environ.get(SIMULATION_VARIABLE)
    if path is None and listing and "partition-id" in context.node_config:
        paths = json.loads(Path(listing).read_text(encoding="utf-8"))
        path = paths[int(context.node_config["partition-id"])]
    if path is None:
        raise SiteError("this node has no site configuration", fix='start it with --node-config site-config="PATH"')
    return load_site(str(path))
