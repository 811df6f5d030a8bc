"""python -m benchmarks.asynchronous"""
