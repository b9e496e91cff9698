"""Parameters on servers: synchronous, asynchronous and everything between.

`ringred.ParameterServer` trains a model; `policies` say who is waited for, `simulate` runs them in simulated time.
"""
