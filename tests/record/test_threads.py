"""Recordings in several threads at once."""

import threading

import torch
import torch._dynamo.testing

from graph_capture import record

X = torch.randn(3, 4)


def test_recordings_that_overlap_leave_torch_compile_as_it_was():
    inside, over = threading.Event(), threading.Event()

    def first():
        with record(X) as recording:
            inside.set()
            over.wait(20)
            recording.output(X + 1)

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait(20)
    with record(X) as recording:
        over.set()
        thread.join()
        recording.output(X * 2)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(lambda x: x * 3, backend=counter)(X)
    assert counter.frame_count == 1
