"""Passes I/Os through the layers of their stacks, and lets them wait for a time or an event of a layer."""

from __future__ import annotations

from ringplane.block.helper_threads import send_to_helpers
from ringplane.block.io import ENDED, HELPED, MOVING, io_at, put
from ringplane.block.stack import CONTINUE, HELP, KEEP, LAYER, LAYER_SIZE, STACK, WAIT
from ringplane.block.transfer import start
from ringplane.compiler.jit import compiled
from ringplane.compiler.units import call
from ringplane.native.access import address_of, view


@compiled
def submit(channel, io):
    """Begin an I/O: it is in the list `ended` of the channel when it has ended."""
    stack = view(io.stack, STACK)
    if stack.layer_count:
        io.level = io.upward = io.done = 0
        put(channel, address_of(channel) + MOVING, io)
    else:
        start(channel, stack, io)


@compiled
def move_all(channel):
    """Move each I/O until it is at the source, a layer keeps it, or it has ended."""
    while channel.moving_first >= 0:
        io = io_at(channel, channel.moving_first)
        channel.moving_first = io.next
        move(channel, view(io.stack, STACK), io)


@compiled
def move(channel, stack, io):
    verdict, index = CONTINUE, 0
    while verdict == CONTINUE:
        if io.upward:
            if io.level == 0:
                put(channel, address_of(channel) + ENDED, io)
                return
            index = io.level = io.level - 1
            verdict = pass_up(channel, layer_at(stack, index), io)
        else:
            if io.level == stack.layer_count:
                start(channel, stack, io)
                return
            index = io.level
            verdict = pass_down(channel, layer_at(stack, index), io)
        if verdict == KEEP:
            # `resume` does the rest.
            return
        if not io.upward:
            # Now, or again, it is below this layer.
            io.level = index + 1
    if verdict == WAIT:
        wait(channel, io)
    elif verdict == HELP:
        layer = layer_at(stack, index)
        io.phase = HELPED
        send_to_helpers(channel, io, layer.help, layer.state)


@compiled
def pass_up(channel, layer, io):
    return call(layer.up, layer.state, address_of(channel), address_of(io)) if layer.up else CONTINUE


@compiled
def pass_down(channel, layer, io):
    return call(layer.down, layer.state, address_of(channel), address_of(io)) if layer.down else CONTINUE


@compiled
def layer_at(stack, level):
    return view(stack.layers + level * LAYER_SIZE, LAYER)


# I/Os that wait for their time, in its order. The place of a new one is searched from the end: where all I/Os wait
# equally long, it is found at once.


@compiled
def wait(channel, io):
    """Insert the I/O into the list of those that wait."""
    before, after = channel.due_last, -1
    while before >= 0 and io_at(channel, before).due > io.due:
        after = before
        before = io_at(channel, before).earlier
    io.next, io.earlier = after, before
    if before < 0:
        channel.due_first = io.slot
    else:
        io_at(channel, before).next = io.slot
    if after < 0:
        channel.due_last = io.slot
    else:
        io_at(channel, after).earlier = io.slot


@compiled
def wake_due(channel):
    """Have those whose time has come continue."""
    while channel.due_first >= 0:
        io = io_at(channel, channel.due_first)
        if io.due > channel.now:
            return
        channel.due_first = io.next
        if io.next < 0:
            channel.due_last = -1
        else:
            io_at(channel, io.next).earlier = -1
        put(channel, address_of(channel) + MOVING, io)


@compiled
def first_due(channel):
    """The time of the next one; call it only if one waits."""
    return io_at(channel, channel.due_first).due
