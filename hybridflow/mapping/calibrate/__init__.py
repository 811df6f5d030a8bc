"""Constants of the simulators, fitted to what a real machine measured."""
