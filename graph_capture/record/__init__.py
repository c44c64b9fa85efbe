"""From the user's code to a `RecordedGraph`: the recorder, the recording check, the guards.

Imports `graph_capture.calls` and what lies below it.
"""
