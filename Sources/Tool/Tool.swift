import ArgumentParser
import FasterMoE

package struct Tool: ParsableCommand {
  package static let configuration = CommandConfiguration(commandName: "fastermoe", abstract: "test")
  package init() {}
  package func run() { print(Cluster.mostWorkers) }
}
