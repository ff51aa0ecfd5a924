"""AWS on this machine: what each provider does when there is no cloud.

Runs the unmodified program with Pulumi's mocks as providers, and boots real systemd machines.
Knows resource types and their inputs, and imports nothing of `components`.
"""
