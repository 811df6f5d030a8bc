"""python -m benchmarks.invariance"""
