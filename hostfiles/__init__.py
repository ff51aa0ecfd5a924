"""Pure rendering: typed values in, the files of a host out.

Nothing in this package imports pulumi, boto or the sandbox, reads the clock, or touches a machine.
"""
