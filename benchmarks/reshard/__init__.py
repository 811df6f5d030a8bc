"""python -m benchmarks.reshard"""
