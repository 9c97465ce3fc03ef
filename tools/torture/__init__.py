"""Bad input, kills, signals and full disks, by the thousand: `make torture` (docs/reliability.md)."""
