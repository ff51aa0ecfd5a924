"""The only code that makes Pulumi resources."""
