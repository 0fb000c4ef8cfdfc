"""The optimizers: Adam of dense weights, averaged Adam of fast weights, Adagrad of rows, a Kalman filter of crosses."""
