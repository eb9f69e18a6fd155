import ArgumentParser
struct Topology: ParsableCommand { func run() throws {} }
