import ArgumentParser
struct Calibrate: ParsableCommand { func run() throws {} }
